"""Kill a client of a paid teacher, start it again, and hold its store against the teacher's bill.

    python tests/faults/kill_buyer.py --kills 1000 --json kills.json
    python tests/faults/kill_buyer.py --every-call

A run of `distill generate` asks questions of the test suite's teacher, and is killed with SIGKILL
at random moments. With --every-call it is killed before each single call that changes the disk, and
in the middle of each write: once in every run, and then one run again and again, one call later
each time. After every kill: no stored answer is lost, none is there twice (opening the store would
say so), the bill lies between what is settled and that plus the maximum of what is unknown, and
`distill status` names every request that was billed and is not stored. At the end of a run every
question is answered, what was billed again is at most what is listed as unknown, and the ledger's
sums are the store's.
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
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.config.teachers import EndpointTeacher  # noqa: E402
from distill.generation.generate import requests_of  # noqa: E402
from distill.pipeline import STAGES  # noqa: E402
from distill.records import Document, Prompt, Response  # noqa: E402
from distill.responders.responder import origin_of  # noqa: E402
from distill.responders.store import ResponseStore  # noqa: E402
from distill.status import read_status, show  # noqa: E402
from distill.storage.files import read_records  # noqa: E402
from distill.storage.run_folder import open_run  # noqa: E402
from tests.support import buying  # noqa: E402
from tests.support.buying import account_of, make_run  # noqa: E402
from tests.support.fake_teacher import KEY, FakeTeacher, Reply, text_of  # noqa: E402
from tests.support.mortal import die_at  # noqa: E402

FIGURES = {"runs", "concurrency", "kills", "billed_again", "unknown"}  # others must be 0
LEDGER = ("dollars", "unknown_dollars", "unknown", "attempts")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# loaded once, not by every child; a child of pytest loads pytest, too
PRELOADED = ["tests.faults.kill_buyer", "httpcore2", "anyio._backends._asyncio"]
PRELOADED += ["pytest"] if "pytest" in sys.modules else []
CONTEXT = multiprocessing.get_context("forkserver")


def generate(config: Path, count: int, half: bool, log: Path) -> None:
    """Be `distill generate CONFIG`, and die at a call that changes the disk."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TEACHER_KEY"] = KEY
    if count >= 0:
        die_at(count, half)
    sys.exit(buying.generate(str(config)))


class Buying:
    """A run that buys, and what must not be; the first reply to the first question is an error."""

    def __init__(self, place: Path, count: int, concurrency: int, delay: float = 0.006) -> None:
        CONTEXT.set_forkserver_preload(PRELOADED)
        self.teacher, self.delay = FakeTeacher(self._reply), delay
        self.place, self.count, self.concurrency = place, count, concurrency
        self.stored, self.faults = set[str](), Counter[str]()
        self.killed = self.unknown = self.most_at_once = 0

    def _reply(self, number: int, payload: dict[str, Any]) -> Reply:
        first = payload["messages"][-1]["content"] == "q0 please" and number == 0
        return Reply(status=500) if first else Reply(delay=self.delay * (number % 4) / 3)

    def __enter__(self) -> "Buying":
        self.teacher.__enter__()
        self.config = make_run(self.place, self.teacher, self.count, concurrency=self.concurrency)
        self.run = run = open_run(self.config)
        self.store = run.config.store_folder() / "responses"
        teacher = run.config.teacher
        assert isinstance(teacher, EndpointTeacher)
        documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
        prompts = read_records(run.path("prompts.jsonl"), Prompt)
        requests = requests_of(teacher, origin_of(teacher), prompts, documents)
        self.questions = {  # and the ids of their answers
            request.messages[-1].content: request.id for request in requests
        }
        return self

    def __exit__(self, *error: object) -> None:
        self.teacher.__exit__(*error)

    def go(self, count: int = -1, half: bool = False, seconds: float = 60) -> bool:
        """Run the command for so long, and look at what it left; return whether it ended itself."""
        log = self.place / "shown"
        child = CONTEXT.Process(target=generate, args=(self.config, count, half, log))
        child.start()
        child.join(seconds)
        if child.exitcode is None:
            child.kill()
            child.join()
        end = time.monotonic() + 2  # for what the killed client had sent
        while self.teacher.busy and time.monotonic() < end:
            time.sleep(0.005)
        if child.exitcode not in (0, -9):
            raise SystemExit(f"status {child.exitcode} at call {count}: {log.read_text()[-2000:]}")
        self.killed += child.exitcode == -9
        self._look(log.read_text() if log.exists() else "")
        return child.exitcode == 0

    def _look(self, shown: str) -> None:
        """Compare the store with what it held before, and with the bill and the status."""
        faults = self.faults
        faults["traceback or key shown"] += any(w in shown for w in ("Traceback", "error:", KEY))
        if not self.store.exists():
            return
        with ResponseStore(self.store) as log:
            now = set(log.keys("response"))
        account = account_of(self.store)
        faults["lost"] += len(self.stored - now)
        most = account.settled + account.unknown_most
        faults["bill out of bounds"] += not account.settled <= self.teacher.bill <= most
        self.most_at_once = max(self.most_at_once, account.unknown - self.unknown)
        self.stored, self.unknown = now, account.unknown
        console = Console(width=300)
        with console.capture() as text:
            console.print(show(read_status(self.run, STAGES)))
        listed = Counter(line.split(".")[0].strip() for line in text.get().splitlines())
        faults["billed, and not listed"] += sum(
            max(0, times - (self.questions[asked] in now) - listed[self.questions[asked]])
            for asked, times in self.teacher.bills.items()
        )

    def end(self) -> Counter[str]:
        """Run the command to its end, hold answers and ledger against the store; return counts."""
        if not self.go():
            raise SystemExit("it was killed, and nobody killed it")
        faults, account = self.faults, account_of(self.store)
        answers = [r.text for r in read_records(self.run.path("responses.jsonl"), Response)]
        faults["missing"] += answers != [text_of(asked) for asked in self.questions]
        again = sum(times - 1 for times in self.teacher.bills.values())
        faults["billed again, not listed"] += max(0, again - self.unknown)
        most = self.concurrency + 1  # and the attempt that met the teacher's error
        faults["more in doubt than in flight"] += self.most_at_once > most
        ledger = self.run.ledger.entries()
        sums = [sum((getattr(e, n) or Decimal(0) for e in ledger), Decimal(0)) for n in LEDGER]
        expected = [account.settled, account.unknown_most, account.unknown, account.attempts]
        faults["ledger is not the store"] += sums != expected
        faults.update(kills=self.killed, billed_again=again, unknown=self.unknown)
        return faults


def every_call(count: int, concurrency: int, chained: bool = True) -> Counter[str]:
    """Kill a run before each call and in each write; then one run at all of them in a row."""
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
            with tempfile.TemporaryDirectory(dir=MEMORY) as place:
                with Buying(Path(place), count, concurrency) as buying:
                    calls = itertools.count()
                    while not buying.go(next(calls), half):
                        pass
                    total.update(buying.end())
    return total


def random_kills(kills: int, questions: int, concurrency: int, seed: int) -> Counter[str]:
    """Kill runs at random moments until there were enough kills; return the sums of the counts."""
    chance, total = random.Random(seed), Counter[str]()
    while total["kills"] < kills:
        with tempfile.TemporaryDirectory(dir=MEMORY) as place:
            with Buying(Path(place), questions, concurrency, delay=0.05) as buying:
                while total["kills"] + buying.killed < kills:
                    if buying.go(seconds=chance.uniform(0.05, 0.5)):
                        break
                total.update(buying.end())
        total["runs"] += 1
    return total


def main() -> None:
    """Kill until there were enough kills, print the table; exit with 1 for a broken promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--every-call", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    row: dict[str, Any] = {"concurrency": options.concurrency}
    if options.every_call:
        row |= every_call(min(options.questions, 40), options.concurrency)
    else:
        row |= random_kills(options.kills, options.questions, options.concurrency, options.seed)
    for name, value in row.items():
        print(f"{name:32} {value}")
    if options.json:
        options.json.write_text(json.dumps(row, indent=2) + "\n")
    sys.exit(any(value for name, value in row.items() if name not in FIGURES))


if __name__ == "__main__":
    main()
