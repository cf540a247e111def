"""Several processes that answer the plans of one teacher, each on a device of its own.

The main process holds the store, records the plans and hands them out: the process of rank r
answers plans r, r + N, ... into a log of its own, `STORE.parts/r`, and the main process takes over
what is there as it comes. What a kill leaves in these logs is taken over by whoever asks next. Who
answers a plan changes nothing in its answers.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from distill.errors import DistillError, Exit
from distill.responders.responder import Plan, Planner, Raw, Request
from distill.responders.store import ResponseStore, Spend
from distill.storage.environment import check_world, die_with_parent
from distill.storage.files import alive, remove_folder
from distill.storage.log import Log
from distill.storage.progress import say

PATIENCE = timedelta(days=30)  # for a process that waits: the launcher ends it where another died
PAUSE = 0.2  # seconds between two looks at what the others have stored
GRACE = 5.0  # seconds until a process that does not end is ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "the same command continues, on any number of processes"
Share = list[str]  # ids of plans; none as a sign to make ready


class Workers:
    """The processes of one launch, as one of them sees them: its `rank`, and all process ids."""

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        self.rank, self.pids = rank, pids

    @classmethod
    def meet(cls) -> "Workers":
        """Join the other processes of this launch.

        Raises DistillError (exit 4) where fewer came than were asked, or a device would be shared.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=True, timeout=PATIENCE)  # few messages are exchanged, no tensors
        world = state.num_processes
        sizes = {"WORLD_SIZE": int(os.environ.get("WORLD_SIZE", "1"))}
        check_world(sizes, world, "scripts/generate.py", Exit.TEACHER)
        if world == 1:
            return cls(0, [os.getpid()])
        die_with_parent()
        check_devices(world)
        return cls(state.process_index, gather_object([os.getpid()]))

    def listen(self) -> None:
        """End well on Ctrl-C and SIGTERM, which the launcher sends to all where one has died."""
        for kind in SIGNALS:
            signal.signal(kind, self._stop if self.rank < 2 else signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Stop, once, and say why: the main process does, or the next where that one has died."""
        _ignore_signals()
        by_launcher = number == signal.SIGTERM
        gone = [rank for rank, pid in enumerate(self.pids) if by_launcher and not alive(pid)]
        if self.rank and 0 not in gone:
            raise SystemExit(Exit.INTERRUPTED)
        if gone:
            where = f"process {gone[0]} (pid {self.pids[gone[0]]})"
            raise DistillError(Exit.TEACHER, where, "has died", AGAIN)
        raise KeyboardInterrupt

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Where the block fails, end the others, who spend on, before anything is summed up."""
        with ExitStack() as undo:
            undo.callback(self._end_others)
            yield
            undo.pop_all()

    def _end_others(self) -> None:
        def running(pid: int) -> bool:
            with suppress(OSError):  # ended, and the launcher has not waited for it: a zombie
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            return alive(pid)

        _ignore_signals()
        deadline = time.monotonic() + GRACE
        while remaining := [pid for pid in self.pids[1:] if running(pid)]:
            late = time.monotonic() > deadline
            for pid in remaining:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            if late:
                return
            time.sleep(PAUSE)

    def lead(
        self,
        planner: Planner,
        missing: Sequence[Request],
        store: ResponseStore,
        spend: Spend | None,
    ) -> Iterator[Raw]:
        """Hand out the plans of what is missing, answer some, and yield everybody's answers."""
        self._send([])
        plans = store.planned(planner, missing)
        self._send([plan.id for plan in plans])
        ids = {request.id for plan in plans for request in plan.requests}
        count = sum(("response", identifier) not in store for identifier in ids)
        mine = store.keep(_answers(planner, plans[:: len(self.pids)]), spend)
        with ExitStack() as opened:
            folders = [_part(store.folder, rank) for rank in range(1, len(self.pids))]
            parts = [opened.enter_context(Log(folder, writable=False)) for folder in folders]
            while count:
                records = [r for part in parts for r in part.news() if r[:2] not in store]
                store.append(records)
                raws = [Raw.model_validate(body) for _, _, body in records]
                if raw := next(mine, None):
                    raws.append(raw)
                count -= len(raws)
                yield from raws
                if not raws:
                    time.sleep(PAUSE)
        self._wait()
        take_over(store)

    def dismiss(self) -> None:
        """Let the others end."""
        self._send(None)

    def join(self, make: Callable[[], Planner], folder: Path, spend: Spend) -> None:
        """Answer what the main process hands out, until all is done.

        The planner is made at its first sign.
        """
        planner: Planner | None = None
        while (share := self._send()) is not None:
            planner = planner or make()
            if share:
                part = ResponseStore(_part(folder, self.rank))
                with Log(folder, writable=False) as main, part as log:
                    ids = share[self.rank :: len(self.pids)]
                    plans = (Plan.model_validate(main.get("plan", key)) for key in ids)
                    for _ in log.keep(_answers(planner, plans), spend, main):
                        pass
                self._wait()

    def _wait(self) -> None:
        """Return when every process has come here."""
        from accelerate import PartialState

        with self._together():
            PartialState().wait_for_everyone()

    def _send(self, share: Share | None = None) -> Share | None:
        """Return, on every process, what the main process gives."""
        from accelerate.utils import broadcast_object_list

        with self._together():
            return broadcast_object_list([share])[0]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn the loss of a process that others wait for into one line (exit 4) of one of them."""
        try:
            yield
        except RuntimeError:  # of torch.distributed: a connection is closed
            if self.rank > 1:
                raise SystemExit(Exit.TEACHER) from None
            what = "has lost another that it was waiting for"
            raise DistillError(Exit.TEACHER, f"process {self.rank}", what, AGAIN) from None


def _ignore_signals() -> None:
    """Take no more notice of signals: the launcher repeats them."""
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def check_devices(world: int) -> None:
    """Stop where processes are on several machines, which share no store, or outnumber the GPUs."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if here != world:
        fix = "start one server on each, and name them in teacher.base_url"
        raise DistillError(Exit.TEACHER, "launcher", "the processes are on several machines", fix)
    if torch.cuda.is_available():
        if world > torch.cuda.device_count():
            what = f"{world} processes, {torch.cuda.device_count()} GPUs"
            raise DistillError(Exit.TEACHER, "launcher", what, "one process a GPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _answers(planner: Planner, plans: Iterable[Plan]) -> Iterator[Sequence[Raw]]:
    return (group for plan in plans for group in planner.ask_plan(plan))


def _part(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}.parts") / str(rank)


def take_over(store: Log) -> None:
    """Copy what lies in the logs of other processes into their store, and remove them.

    Raises DistillError (exit 5) where one is being written, or is damaged.
    """
    folder = _part(store.folder, 0).parent
    names = {path.name.removesuffix(".repaired") for path in folder.glob("[0-9]*")}
    count = 0
    for part in sorted(folder / name for name in names if name.isdigit()):
        with Log(part) as log:  # a torn tail goes, and nobody writes
            count += store.copy(log.news())
        remove_folder(part)
    with suppress(OSError):  # not there, or it holds what a repair has kept
        folder.rmdir()
    if count:
        say(f"{store.folder}: {count} answers taken over from a run that was cut off")
