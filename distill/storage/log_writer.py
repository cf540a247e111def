"""Durable writes to a log from one event loop: what waits during an fsync shares the next one."""

import asyncio

from distill.storage.log import Log, NewRecord


class LogWriter:
    """Writes groups of records, one group at a time, in the order in which they came."""

    def __init__(self, log: Log) -> None:
        self.log, self._lock = log, asyncio.Lock()
        self._group: list[NewRecord] | None = None  # that waits for the one that is written
        self._task: asyncio.Task[None] | None = None

    async def write(self, *records: NewRecord) -> None:
        """Return once the records are on the disk; they come there too if the caller is cancelled.

        Raises DistillError (exit 5) where the disk refuses.
        """
        if self._group is None or self._task is None:
            self._group = []
            self._task = asyncio.create_task(self._store(self._group))
        self._group += records
        await asyncio.shield(self._task)

    async def _store(self, group: list[NewRecord]) -> None:
        async with self._lock:
            self._group = None  # complete: who comes now waits for the next
            await asyncio.to_thread(self.log.append, group)

    async def finished(self) -> None:
        """Return once nothing waits to be written."""
        if self._task is not None:
            await asyncio.wait([self._task])
