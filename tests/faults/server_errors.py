"""Ask a faulty teacher thousands of questions; count what became of them and of the money.

    python tests/faults/server_errors.py --requests 10000 --faults 0.2 --json faults.json

The teacher is the test suite's: a real HTTP server on a loopback port, with a bill of its own; the
client is the command `distill generate`. Of the replies the given share is a fault, drawn at random
from all kinds that a run survives. Afterwards every question must be answered or labelled failed,
none of 400 and 422 asked twice, and the teacher's bill between what is settled and that plus the
maximum of what is unknown. What a run does not survive (401, 402, 403, 404, 405, redirects) then
meets a small run each, which must stop at once and ask nothing again. The canary key may stand in
no byte that was written or printed: store, config, manifest, ledger, answers, card, what the
commands say.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.cli import main as distill_main  # noqa: E402
from distill.errors import Exit  # noqa: E402
from distill.evaluation.scorecard import Scorecard  # noqa: E402
from distill.publishing.card import Facts, make_card  # noqa: E402
from distill.publishing.obligations import ReleaseLicense  # noqa: E402
from distill.records import Response  # noqa: E402
from distill.responders.store import ResponseStore  # noqa: E402
from distill.storage.files import read_records  # noqa: E402
from distill.storage.run_folder import Run, open_run  # noqa: E402
from tests.support.buying import account_of, generate, make_run  # noqa: E402
from tests.support.fake_teacher import ECHO, FAULTS, KEY, FakeTeacher, Reply, question  # noqa: E402

FINAL = {"400", "422", "413"}  # never asked again


class Faulty:
    """Draws the teacher's replies, and notes which faults each question met."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.random = share, random.Random(seed)
        self.names, self.drawn = sorted(FAULTS), Counter[str]()
        self.refused: set[str] = set()
        self.again = 0  # requests for what had been refused for good

    def __call__(self, number: int, payload: dict[str, Any]) -> Reply:
        """Return the reply to a request."""
        asked = question(payload)
        self.again += asked in self.refused
        if self.random.random() >= self.share:
            return Reply()
        name = self.random.choice(self.names)
        self.drawn[name] += 1
        if name in FINAL:
            self.refused.add(asked)
        return Reply(**FAULTS[name])


STOPPING = (401, 402, 403, 404, 405, 301, 307)
PATIENCE = {
    "max_new_tokens": 40,
    "max_retries": 6,
    "read_timeout": 1,
    "total_timeout": 3,
    "initial_backoff": 0.02,
    "max_body_bytes": 1_000_000,
}


def command(folder: Path, *words: str) -> int:
    """Run `distill WORDS` with the canary as its key; what it prints goes to the file `shown`."""
    os.environ["TEACHER_KEY"] = KEY
    with (folder / "shown").open("a") as shown, redirect_stdout(shown), redirect_stderr(shown):
        return generate(*words[1:]) if words[0] == "generate" else distill_main(words)


def trial(count: int, share: float, seed: int, concurrency: int, folder: Path) -> dict[str, Any]:
    """Ask `count` questions of a teacher that fails at a share of requests; return the counts."""
    faulty = Faulty(share, seed)
    with FakeTeacher(faulty) as teacher:
        config = make_run(folder, teacher, count, concurrency=concurrency, **PATIENCE)
        started, cpu = time.monotonic(), time.process_time()
        code = command(folder, "generate", str(config))
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    if code:
        raise SystemExit(f"exit {code}: {(folder / 'shown').read_text()[-2000:]}")
    run = open_run(config)
    responses = read_records(run.path("responses.jsonl"), Response)
    store = run.config.store_folder() / "responses"
    account = account_of(store)
    most = account.settled + account.unknown_most
    with ResponseStore(store, writable=False) as log:
        stored = sum(1 for _ in log.keys("response"))
    return {
        **{f"stop_{stop}": n for stop, n in sorted(Counter(r.stop for r in responses).items())},
        "unlabelled": sum(r.stop == "error" and not r.error for r in responses),
        "settled": str(account.settled),
        "bill": str(teacher.bill),
        "settled_and_unknown": str(most),
        "unknown": account.unknown,
        "attempts": account.attempts,
        "bill_in_bounds": account.settled <= teacher.bill <= most,
        "exit_code": code,
        "questions": count,
        "stored": stored,
        "requests": len(teacher.payloads),
        "requests_allowed": count * (1 + PATIENCE["max_retries"]),
        "faults": sum(faulty.drawn.values()),
        "fault_kinds": len(faulty.drawn),
        "asked_again_after_a_refusal": faulty.again,
        "canary_found": canary(folder, run),
        "seconds": round(seconds, 1),
        "cpu_seconds_of_client_and_teacher": round(cpu, 1),
    }


def stopping_trial(status: int, folder: Path) -> dict[str, Any]:
    """Let a teacher answer a few questions, then refuse all; return what the run did."""
    refusal = Reply(status=status, body=ECHO, headers={"location": "http://127.0.0.1:9/"})
    with FakeTeacher(lambda number, payload: refusal if number >= 8 else Reply()) as teacher:
        config = make_run(folder, teacher, 100, concurrency=8, **PATIENCE)
        code = command(folder, "generate", str(config))
    return {
        "exit_code": code,
        "refused": len(teacher.payloads) - 8,
        "asked_again": sum(teacher.asked.values()) - len(teacher.asked),
        "canary_found": canary(folder, open_run(config)),
    }


def stopped_well(row: dict[str, Any]) -> bool:
    """Tell whether a run that was refused stopped at once."""
    few = 1 <= row["refused"] <= 8
    return row["exit_code"] == Exit.TEACHER and few and not row["asked_again"] + row["canary_found"]


def canary(folder: Path, run: Run) -> int:
    """Count the files that hold the key: what was written, what commands print, the card."""
    for verb in ("status", "plan"):
        command(folder, verb, str(folder / "c.yaml"))
    license = ReleaseLicense("apache-2.0", stated=True, owed=False, text="")
    facts = Facts(run.config, run.config.name, None, license)
    (folder / "card.md").write_text(str(make_card(facts, Scorecard(name=run.config.name))))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"shown", "config.json", "manifest.json", "ledger.jsonl"} <= {f.name for f in files}
    return sum(KEY.encode() in path.read_bytes() for path in files)


def passed(row: dict[str, Any]) -> bool:
    """Tell whether every promise was kept."""
    ended = sum(n for name, n in row.items() if name.startswith("stop_"))
    none = ("exit_code", "unlabelled", "asked_again_after_a_refusal", "canary_found")
    within = row["bill_in_bounds"] and row["requests"] <= row["requests_allowed"]
    return within and ended == row["questions"] and not any(row[name] for name in none)


def main() -> None:
    """Run one trial a seed, print the table, and exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--faults", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            row = trial(options.requests, options.faults, seed, options.concurrency, Path(folder))
        rows.append({"seed": seed, **row, "passed": passed(row)})
        for name, value in rows[-1].items():
            print(f"{name:36} {value}")
    stops = {}
    for status in STOPPING:
        with tempfile.TemporaryDirectory() as folder:
            stops[status] = stopping_trial(status, Path(folder))
        print(f"{status} stops the run{'':17} {stops[status]}")
    if options.json:
        options.json.write_text(json.dumps({"trials": rows, "stops": stops}, indent=2) + "\n")
    well = all(stopped_well(row) for row in stops.values())
    sys.exit(not (well and all(row["passed"] for row in rows)))


if __name__ == "__main__":
    main()
