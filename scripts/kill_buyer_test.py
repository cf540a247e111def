"""Kill a client of a paid teacher at random moments, start it again, and hold its store against the teacher's bill.

    python scripts/kill_buyer_test.py --kills 1000 --json kills.json

A complete run asks a few hundred questions of the test suite's teacher, and is killed with SIGKILL as often as it
lasts. After every kill: no stored answer is lost, none is there twice (opening the store would say so), and the bill lies
between what is settled and that plus the maximum of what is unknown. At the end of a run every question is answered, and
what was billed again is at most what is listed as unknown.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill.config import Teacher  # noqa: E402
from distill.generation.asking import origin_of  # noqa: E402
from distill.generation.budget import account  # noqa: E402
from distill.generation.endpoint import EndpointResponder  # noqa: E402
from distill.generation.generate import answer_all  # noqa: E402
from distill.generation.responder import Request, Sampling  # noqa: E402
from distill.progress import console  # noqa: E402
from distill.records import Message  # noqa: E402
from distill.store import Log  # noqa: E402
from tests.fake_teacher import PRICE, FakeTeacher, Reply  # noqa: E402


def buy(url: str, count: int, concurrency: int, folder: Path) -> None:
    """Be the client: ask all questions that the store lacks."""
    console.quiet = True
    settings = Teacher.model_validate(
        {"kind": "endpoint", "model": "m", "base_url": url, "concurrency": concurrency}
    )
    origin, sampling = origin_of(settings), Sampling()
    requests = [
        Request.make(origin, str(i), (Message(role="user", content=f"q {i}"),), sampling)
        for i in range(count)
    ]
    answer_all(EndpointResponder(settings, PRICE, "t"), requests, folder, "x")


class Witness:
    """Looks at the store after every kill, and counts what must not be."""

    def __init__(self, teacher: FakeTeacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.stored: set[str] = set()
        self.faults = Counter[str]()
        self.unknown = 0

    def look(self) -> None:
        """Compare the store with what it held before, and with the bill."""
        if not self.folder.exists():
            return
        with Log(self.folder) as log:
            now = set(log.keys("response"))
            found = account(log, PRICE)
        self.faults["lost"] += len(self.stored - now)
        most = found.settled + found.unknown_most
        self.faults["bill out of bounds"] += not found.settled <= self.teacher.bill <= most
        self.stored, self.unknown = now, found.unknown


def complete_run(count: int, concurrency: int, chance: random.Random, kills: int) -> dict[str, Any]:
    """Start the client until it ends by itself, with at most `kills` kills; return the counts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "distill.generation.endpoint"])

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(delay=chance.uniform(0, 0.05))

    killed, most_at_once = 0, 0
    with tempfile.TemporaryDirectory() as place, FakeTeacher(script) as teacher:
        folder = Path(place) / "store"
        witness = Witness(teacher, folder)
        while True:
            before = witness.unknown
            child = context.Process(target=buy, args=(teacher.url, count, concurrency, folder))
            child.start()
            child.join(chance.uniform(0.05, 0.5) if killed < kills else 120)
            if child.exitcode is None:
                child.kill()
                child.join()
                killed += 1
            done = child.exitcode == 0
            settle(teacher)
            witness.look()
            most_at_once = max(most_at_once, witness.unknown - before)
            if done:
                break
    again = sum(times - 1 for times in teacher.bills.values())
    witness.faults["missing"] += count - len(witness.stored)
    witness.faults["billed again, not listed"] += max(0, again - witness.unknown)
    witness.faults["more in doubt than in flight"] += most_at_once > concurrency
    return {"kills": killed, "billed_again": again, "unknown": witness.unknown, **witness.faults}


def settle(teacher: FakeTeacher) -> None:
    """Wait until the teacher has dealt with what the killed client had sent."""

    end = time.monotonic() + 2
    while teacher.busy and time.monotonic() < end:
        time.sleep(0.005)


def main() -> None:
    """Kill until there were enough kills, print the table, and exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chance, total, runs = random.Random(given.seed), Counter[str](), 0
    while total["kills"] < given.kills:
        left = given.kills - total["kills"]
        total.update(complete_run(given.questions, given.concurrency, chance, left))
        runs += 1
    row = {"runs": runs, "concurrency": given.concurrency, **total}
    for name, value in row.items():
        print(f"{name:32} {value}")
    if given.json:
        given.json.write_text(json.dumps(row, indent=2) + "\n")
    faults = set(total) - {"kills", "billed_again", "unknown"}
    sys.exit(any(total[name] for name in faults))


if __name__ == "__main__":
    main()
