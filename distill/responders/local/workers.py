"""Several processes that answer the plans of one teacher, each on a device of its own.

The main process holds the store, records the plans and hands them out: the process of rank r answers plans r, r + N, ...
into a log of its own, `STORE.parts/r`, and the main process takes over what is there as it comes. What a kill leaves in
these logs is taken over by whoever asks next. Who answers a plan changes nothing in its answers.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from distill.errors import DistillError, Exit
from distill.records import Response
from distill.responders.local.plans import Spend, answers, planned, store_each
from distill.responders.responder import Plan, Planner, Raw, Request
from distill.storage.files import remove_folder
from distill.storage.locks import alive
from distill.storage.log import Log, Tail, copy
from distill.storage.processes import (
    asked_of_launcher,
    check_world,
    die_with_parent,
    launcher_command,
)
from distill.storage.progress import say

PATIENCE = timedelta(
    days=30
)  # for one that waits for another: the launcher ends it where that one has died
PAUSE = 0.2  # seconds between two looks at what the others have stored
GRACE = 5.0  # seconds until a process that does not end is ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "the same command continues, on any number of processes"
Share = list[str]  # ids of plans; none as a sign to make ready


class Crew:
    """The processes of one launch, as one of them sees them: its `rank`, how many, and their process ids."""

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        self.rank, self.pids = rank, pids

    @classmethod
    def meet(cls) -> "Crew":
        """Join the other processes of this launch.

        Raises DistillError (exit 4) where fewer came than were asked, or a device would be shared.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=True, timeout=PATIENCE)  # few words are exchanged, and no tensors
        world = state.num_processes
        asked = {
            "WORLD_SIZE": int(os.environ.get("WORLD_SIZE", "1")),
            "launcher": asked_of_launcher(launcher_command()),
        }
        check_world(asked, world, "scripts/generate.py", Exit.TEACHER)
        if world == 1:
            return cls(0, [os.getpid()])
        die_with_parent()
        _check_places(world)
        return cls(state.process_index, gather_object([os.getpid()]))

    def listen(self) -> None:
        """End well on Ctrl-C and SIGTERM, which the launcher sends to all where one has died."""
        for kind in SIGNALS:
            signal.signal(kind, self._stop if self.rank < 2 else signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Stop, once, and say why: the main process does, or the next where that one has died."""
        _ignore_signals()
        told = number == signal.SIGTERM
        gone = [rank for rank, pid in enumerate(self.pids) if told and not alive(pid)]
        if self.rank and 0 not in gone:
            raise SystemExit(Exit.INTERRUPTED)
        if gone:
            where = f"process {gone[0]} (pid {self.pids[gone[0]]})"
            raise DistillError(Exit.TEACHER, where, "has died", AGAIN)
        raise KeyboardInterrupt

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Where the block fails, end the others before anything is summed up: they would go on spending."""
        with ExitStack() as undo:
            undo.callback(self._end_others)
            yield
            undo.pop_all()

    def _end_others(self) -> None:
        _ignore_signals()
        deadline = time.monotonic() + GRACE
        while left := [pid for pid in self.pids[1:] if _running(pid)]:
            late = time.monotonic() > deadline
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            if late:
                return
            time.sleep(PAUSE)

    def lead(
        self, planner: Planner, missing: Sequence[Request], log: Log, spend: Spend | None
    ) -> Iterator[Raw]:
        """Hand out the plans of what is missing, answer some, and yield everybody's answers once they are stored."""
        self._send([])
        plans = planned(planner, missing, log)
        self._send([plan.id for plan in plans])
        asked = {Response.make_id(r.key, r.sample) for plan in plans for r in plan.requests}
        left = sum(("response", identifier) not in log for identifier in asked)
        tails = [Tail(_part(log.folder, rank)) for rank in range(1, len(self.pids))]
        own = store_each(answers(planner, plans[:: len(self.pids)]), log, spend)
        while left:
            raw = next(own, None)
            found = ([raw] if raw else []) + _gathered(tails, log)
            left -= len(found)
            yield from found
            if not found:
                time.sleep(PAUSE)
        self._wait()
        take_over(log)

    def dismiss(self) -> None:
        """Tell the others that all is done."""
        self._send(None)

    def join(self, make: Callable[[], Planner], folder: Path, spend: Spend) -> None:
        """Answer what the main process hands out, with a planner that is made at its first sign, until all is done."""
        planner: Planner | None = None
        while (share := self._send()) is not None:
            planner = planner or make()
            if share:
                mine = share[self.rank :: len(self.pids)]
                with Log(folder, writable=False) as known, Log(_part(folder, self.rank)) as log:
                    plans = (Plan.model_validate(known.get("plan", key)) for key in mine)
                    for _ in store_each(answers(planner, plans), log, spend, known):
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
        """Turn the loss of a process that others wait for into one line (exit 4), said by one of them."""
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


def _running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended, and that the launcher has not waited for, does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return alive(pid)


def _check_places(world: int) -> None:
    """Stop where processes are on several machines, which share no store, or are more than the GPUs."""
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


def _parts(store: Path) -> Path:
    return store.with_name(f"{store.name}.parts")


def _part(store: Path, rank: int) -> Path:
    return _parts(store) / str(rank)


def _gathered(tails: Sequence[Tail], log: Log) -> list[Raw]:
    """Store what the others have stored since the last look, and return it."""
    found = [r for tail in tails for r in tail.read() if r[:2] not in log]
    log.append(found)
    return [Raw.model_validate(body) for _, _, body in found]


def take_over(log: Log) -> None:
    """Copy what lies in the logs of other processes into their store, and remove them.

    Raises DistillError (exit 5) where one is being written, or is damaged.
    """
    folder = _parts(log.folder)
    names = {path.name.removesuffix(".repaired") for path in folder.glob("[0-9]*")}
    count = 0
    for part in sorted(folder / name for name in names if name.isdigit()):
        with Log(part):  # a torn tail goes, and nobody writes
            count += copy(Tail(part).read(), log)
        remove_folder(part)
    with suppress(OSError):  # not there, or it holds what a repair has kept
        folder.rmdir()
    if count:
        say(f"{log.folder}: {count} answers taken over from a run that was cut off")
