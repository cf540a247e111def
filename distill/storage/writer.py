"""Durable writes from async code: what waits while one fsync runs is written together by the next."""

import asyncio
from collections.abc import Sequence
from typing import Any

from distill.errors import DistillError
from distill.storage.store import Log

Entry = tuple[str, str, Any]  # kind, key, body


class Scribe:
    """Writes to a log from one event loop; the log's writer is no other meanwhile."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._waiting: list[tuple[Sequence[Entry], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, *entries: Entry) -> None:
        """Return once the entries are on the disk; they get there also when the caller is cancelled meanwhile.

        Raises DistillError (exit 5) where the disk refuses.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        await done

    async def finished(self) -> None:
        """Return once nothing waits to be written."""
        if self._task is not None:
            await self._task

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            fault = None
            try:
                records = [entry for entries, _ in group for entry in entries]
                await asyncio.to_thread(self.log.append, records)
            except DistillError as error:
                fault = error
            for _, done in group:
                if not done.done():
                    done.set_exception(fault) if fault else done.set_result(None)
