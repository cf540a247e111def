"""Kill a client of a paid teacher at random moments, start it again, and hold its store against the
teacher's bill.

    python tests/faults/kill_buyer.py --kills 1000 --json kills.json
    python tests/faults/kill_buyer.py --every-call

A complete run asks a few hundred questions of the test suite's teacher, and is killed with SIGKILL
as often as it lasts. With --every-call, `distill generate` is killed before each single call that
changes the disk, and in the middle of each write: once in every run, and then one run again and
again, one call later each time. After every kill: no stored answer is lost, none is there twice
(opening the store would say so), the bill lies between what is settled and that plus the maximum of
what is unknown, and `distill status` names every request that was billed and is not stored. At the
end of a run every question is answered, what was billed again is at most what is listed as unknown,
and the ledger's sums are the store's.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.cli import main as distill_main  # noqa: E402
from distill.config.teachers import EndpointTeacher  # noqa: E402
from distill.generation.generate import requests_for  # noqa: E402
from distill.pipeline import STAGES  # noqa: E402
from distill.records import Document, Message, Prompt, Response  # noqa: E402
from distill.responders.endpoint.budget import account  # noqa: E402
from distill.responders.endpoint.endpoint import EndpointResponder  # noqa: E402
from distill.responders.endpoint.sending import origin_of  # noqa: E402
from distill.responders.responder import Request, Sampling  # noqa: E402
from distill.responders.store import ResponseStore  # noqa: E402
from distill.status import read_status, show  # noqa: E402
from distill.storage.files import read_records  # noqa: E402
from distill.storage.progress import console  # noqa: E402
from distill.storage.run_folder import Run, open_run  # noqa: E402
from tests.support.asking import answer_all  # noqa: E402
from tests.support.buying import KEY, make_run  # noqa: E402
from tests.support.fake_teacher import PRICE, FakeTeacher, Reply, text_of  # noqa: E402
from tests.support.mortal import die_at  # noqa: E402

FIGURES = {
    "runs",
    "concurrency",
    "kills",
    "billed_again",
    "unknown",
}  # the rest counts what must not be
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# loaded once, not by every child; a child of pytest loads pytest, too
PRELOADED = ["tests.faults.kill_buyer", "httpcore2", "anyio._backends._asyncio"]
PRELOADED += ["pytest"] if "pytest" in sys.modules else []
CONTEXT = multiprocessing.get_context("forkserver")


def buy(url: str, count: int, concurrency: int, folder: Path) -> None:
    """Be the client: ask all questions that the store lacks."""
    console.quiet = True
    settings = EndpointTeacher.model_validate(
        {"kind": "endpoint", "model": "m", "base_url": url, "concurrency": concurrency}
    )
    origin, sampling = origin_of(settings), Sampling()
    requests = [
        Request.make(origin, str(i), (Message(role="user", content=f"q {i}"),), sampling)
        for i in range(count)
    ]
    answer_all(EndpointResponder(settings, PRICE, "t"), requests, folder)


class Witness:
    """Looks at the store after every kill, and counts what must not be."""

    def __init__(self, teacher: FakeTeacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.stored: set[str] = set()
        self.faults = Counter[str]()
        self.unknown = self.most_at_once = 0

    def look(self) -> None:
        """Compare the store with what it held before, and with the bill."""
        if not self.folder.exists():
            return
        with ResponseStore(self.folder) as log:
            now = set(log.keys("response"))
            found = account(log, {"m": PRICE, "fake-1": PRICE})
        self.faults["lost"] += len(self.stored - now)
        most = found.settled + found.unknown_most
        self.faults["bill out of bounds"] += not found.settled <= self.teacher.bill <= most
        self.most_at_once = max(self.most_at_once, found.unknown - self.unknown)
        self.stored, self.unknown = now, found.unknown


def complete_run(count: int, concurrency: int, chance: random.Random, kills: int) -> dict[str, Any]:
    """Start the client until it ends by itself, with at most `kills` kills; return the counts."""
    CONTEXT.set_forkserver_preload(PRELOADED)

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(delay=chance.uniform(0, 0.05))

    killed = 0
    with tempfile.TemporaryDirectory() as place, FakeTeacher(script) as teacher:
        folder = Path(place) / "store"
        witness = Witness(teacher, folder)
        while True:
            child = CONTEXT.Process(target=buy, args=(teacher.url, count, concurrency, folder))
            child.start()
            child.join(chance.uniform(0.05, 0.5) if killed < kills else 120)
            if child.exitcode is None:
                child.kill()
                child.join()
                killed += 1
            done = child.exitcode == 0
            settle(teacher)
            witness.look()
            if done:
                break
    again = sum(times - 1 for times in teacher.bills.values())
    witness.faults["missing"] += count - len(witness.stored)
    witness.faults["billed again, not listed"] += max(0, again - witness.unknown)
    witness.faults["more in doubt than in flight"] += witness.most_at_once > concurrency
    return {"kills": killed, "billed_again": again, "unknown": witness.unknown, **witness.faults}


def settle(teacher: FakeTeacher) -> None:
    """Wait until the teacher has dealt with what the killed client had sent."""

    end = time.monotonic() + 2
    while teacher.busy and time.monotonic() < end:
        time.sleep(0.005)


# --- a kill at every call


def generate(config: Path, count: int, half: bool, log: Path) -> None:
    """Be `distill generate CONFIG`, and die at the `count`-th call that changes the disk (never
    where negative)."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TEACHER_KEY"] = KEY
    if count >= 0:
        die_at(count, half)
    sys.exit(distill_main(["generate", str(config)]))


class Buying:
    """A run that buys from a teacher whose first reply to the first question is a fault, and its
    witness."""

    def __init__(self, place: Path, count: int, concurrency: int) -> None:
        self.teacher = FakeTeacher(self._reply)
        self.place, self.count, self.concurrency = place, count, concurrency
        self.killed = 0

    def _reply(self, number: int, payload: dict[str, Any]) -> Reply:
        first = payload["messages"][-1]["content"] == "q0 please" and number == 0
        return Reply(status=500) if first else Reply(delay=number % 4 / 500)

    def __enter__(self) -> "Buying":
        self.teacher.__enter__()
        self.config = make_run(self.place, self.teacher, self.count, concurrency=self.concurrency)
        self.run: Run = open_run(self.config)
        self.witness = Witness(self.teacher, self.run.config.store_folder() / "responses")
        self.questions = dict(self._questions())
        return self

    def __exit__(self, *fault: object) -> None:
        self.teacher.__exit__(*fault)

    def _questions(self) -> Iterator[tuple[str, str]]:
        """Yield every question with the id of its answer."""
        teacher = self.run.config.teacher
        assert isinstance(teacher, EndpointTeacher)
        origin = origin_of(teacher)
        documents = read_records(self.run.path("documents.jsonl"), Document)
        for prompt in read_records(self.run.path("prompts.jsonl"), Prompt):
            document = next(d for d in documents if d.id == prompt.document_id)
            for request in requests_for(teacher, origin, prompt, document):
                yield prompt.messages[-1].content, Response.make_id(request.key, request.sample)

    def go(self, count: int = -1, half: bool = False) -> bool:
        """Run the command, and look at what it left; return whether it came to its end."""
        log = self.place / "shown"
        child = CONTEXT.Process(target=generate, args=(self.config, count, half, log))
        child.start()
        child.join(60)
        settle(self.teacher)
        if child.exitcode not in (0, -9):
            raise SystemExit(f"status {child.exitcode} at call {count}: {log.read_text()[-2000:]}")
        self.killed += child.exitcode == -9
        self.witness.look()
        self.witness.faults["billed, and not listed"] += self._unlisted()
        self.witness.faults["traceback or key shown"] += self._shows_too_much(log)
        return child.exitcode == 0

    def _unlisted(self) -> int:
        """Count what was billed, is not stored, and is not named by `distill status`."""
        shown = Console(width=300)
        with shown.capture() as text:
            shown.print(show(read_status(self.run, STAGES)))
        listed = Counter(line.split(".")[0].strip() for line in text.get().splitlines())
        stored = self.witness.stored
        return sum(
            max(0, times - (self.questions[asked] in stored) - listed[self.questions[asked]])
            for asked, times in self.teacher.bills.items()
        )

    def _shows_too_much(self, log: Path) -> bool:
        text = log.read_text()
        return "Traceback" in text or "error:" in text or KEY in text

    def end(self) -> Counter[str]:
        """Run the command to its end, hold its answers and its ledger against the store; return all
        counts."""
        if not self.go():
            raise SystemExit("it was killed, and nobody killed it")
        run, faults = self.run, self.witness.faults
        answers = [r.text for r in read_records(run.path("responses.jsonl"), Response)]
        faults["missing"] += answers != [text_of(asked) for asked in self.questions]
        again = sum(times - 1 for times in self.teacher.bills.values())
        faults["billed again, not listed"] += max(0, again - self.witness.unknown)
        most = self.concurrency + 1  # and the attempt that met the teacher's fault
        faults["more in doubt than in flight"] += self.witness.most_at_once > most
        with ResponseStore(self.witness.folder, writable=False) as log:
            found = account(log, {"m": PRICE, "fake-1": PRICE})
        ledger = run.ledger.entries()
        sums = [sum((getattr(e, n) or Decimal(0) for e in ledger), Decimal(0)) for n in LEDGER]
        wanted = [found.settled, found.unknown_most, found.unknown, found.attempts]
        faults["ledger is not the store"] += sums != wanted
        faults.update(kills=self.killed, billed_again=again, unknown=self.witness.unknown)
        return faults


LEDGER = ("dollars", "unknown_dollars", "unknown", "attempts")


def every_call(count: int, concurrency: int, chained: bool = True) -> Counter[str]:
    """Kill a run before each call and in each write, and continue it; then one run at all of them
    in a row."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    total = Counter[str]()
    for half in (False, True):
        for call in itertools.count():
            with tempfile.TemporaryDirectory(dir=MEMORY) as place:
                with Buying(Path(place), count, concurrency) as buying:
                    done = buying.go(call, half)
                    total.update(buying.end())
            if done:
                break
        if chained:
            total.update(every_call_in_a_row(count, concurrency, half))
    return total


def every_call_in_a_row(count: int, concurrency: int, half: bool) -> Counter[str]:
    """Kill one run again and again, one call later each time, until it ends before its time has
    come."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        with Buying(Path(place), count, concurrency) as buying:
            calls = itertools.count()
            while not buying.go(next(calls), half):
                pass
            return buying.end()


def main() -> None:
    """Kill until there were enough kills, print the table, and exit with 1 where a promise was
    broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--every-call", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    row: dict[str, Any] = {"concurrency": given.concurrency}
    if given.every_call:
        row |= every_call(min(given.questions, 40), given.concurrency)
    else:
        row |= random_kills(given.kills, given.questions, given.concurrency, given.seed)
    for name, value in row.items():
        print(f"{name:32} {value}")
    if given.json:
        given.json.write_text(json.dumps(row, indent=2) + "\n")
    sys.exit(any(value for name, value in row.items() if name not in FIGURES))


def random_kills(kills: int, questions: int, concurrency: int, seed: int) -> dict[str, int]:
    """Kill complete runs at random moments until there were enough kills; return the sums of their
    counts."""
    chance, total = random.Random(seed), Counter[str]()
    while total["kills"] < kills:
        total.update(complete_run(questions, concurrency, chance, kills - total["kills"]))
        total["runs"] += 1
    return total


if __name__ == "__main__":
    main()
