"""Ask a faulty teacher thousands of questions, and count what became of each of them and of the
money.

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
from distill.publishing.card import make_card  # noqa: E402
from distill.publishing.fidelity import Fidelity  # noqa: E402
from distill.publishing.obligations import ReleaseLicense  # noqa: E402
from distill.publishing.publish import facts_of  # noqa: E402
from distill.records import Response  # noqa: E402
from distill.responders.endpoint.budget import Account, account  # noqa: E402
from distill.responders.store import ResponseStore  # noqa: E402
from distill.storage.files import read_records  # noqa: E402
from distill.storage.run_folder import Run, open_run  # noqa: E402
from tests.support.buying import make_run  # noqa: E402
from tests.support.fake_teacher import PRICES, FakeTeacher, Reply, bomb, question  # noqa: E402

KEY = "canary-2718281828459045"
ECHO = json.dumps({"error": {"message": f"what of {KEY}?", "code": "x"}}).encode()
FAULTS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "body": ECHO},
    "429 wait": {"status": 429, "body": b"", "headers": {"retry-after-ms": "30"}},
    "429 garbage": {"status": 429, "body": b"<html>", "headers": {"retry-after": "soon"}},
    "500": {"status": 500, "body": ECHO},
    "500 billed": {"status": 500, "body": b"", "billed": True},
    "502 html": {"status": 502, "body": b"<html>bad gateway"},
    "503": {"status": 503, "body": b"", "headers": {"retry-after": "0"}},
    "504 billed": {"status": 504, "body": b"", "billed": True},
    "408": {"status": 408, "body": ECHO},
    "400": {"status": 400, "body": ECHO},
    "422": {"status": 422, "body": b'{"detail": "no"}'},
    "413": {"status": 413, "body": b""},
    "html on 200": {"body": b"<!doctype html>", "billed": False},
    "empty": {"body": b"", "billed": True},
    "error on 200": {"body": ECHO, "billed": True},
    "reset": {"manner": "reset", "billed": True},
    "closed": {"manner": "silent", "billed": True},
    "half": {"manner": "half", "billed": True},
    "endless": {"manner": "endless", "billed": True},
    "hang": {"manner": "hang", "billed": True},
    "bomb": {"body": bomb(3_000_000), "headers": {"content-encoding": "gzip"}, "billed": True},
    "cut JSON": {"body": b'{"choices": [{"mess', "billed": True},
    "not UTF-8": {"body": b'{"choices": "\xff"}', "billed": True},
    "no choices": {"body": b'{"choices": []}', "billed": True},
    "deep": {"body": b'{"choices": ' + b"[" * 50_000, "billed": True},
    "length": {"finish": "length"},
    "filter": {"finish": "content_filter"},
    "refusal": {"message": {"content": None, "refusal": f"{KEY}? no"}},
    "tool": {"finish": "tool_calls", "message": {"content": None, "tool_calls": [{}]}},
    "unknown stop": {"finish": "moon"},
    "no usage": {"answer": {"usage": None}},
    "negative usage": {"answer": {"usage": {"prompt_tokens": -1, "completion_tokens": "x"}}},
    "slow": {"delay": 0.3},
}
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
SAME = Fidelity(prompts=8, tokens=400, largest_logit_difference=0, mean_kl=0, greedy_agreement=1)
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
        return distill_main(words)


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
    with ResponseStore(run.config.store_folder() / "responses", writable=False) as log:
        found = account(log, PRICES, run.config.name)
        stored = sum(1 for _ in log.keys("response"))
    return {
        **outcomes(responses),
        **money(found, teacher),
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


def outcomes(responses: list[Response]) -> dict[str, int]:
    """Count the answers by how they stopped, and those that lack a label."""
    stops = Counter(response.stop for response in responses)
    unlabelled = sum(r.stop == "error" and not r.error for r in responses)
    return {**{f"stop_{stop}": n for stop, n in sorted(stops.items())}, "unlabelled": unlabelled}


def money(found: Account, teacher: FakeTeacher) -> dict[str, Any]:
    """Return the account beside the teacher's bill."""
    return {
        "settled": str(found.settled),
        "bill": str(teacher.bill),
        "settled_and_unknown": str(found.settled + found.unknown_most),
        "unknown": found.unknown,
        "attempts": found.attempts,
        "bill_in_bounds": found.settled <= teacher.bill <= found.settled + found.unknown_most,
    }


def canary(folder: Path, run: Run) -> int:
    """Count the files that hold the key: all that was written, what three commands print, and the
    card."""
    for verb in ("status", "plan"):
        command(folder, verb, str(folder / "c.yaml"))
    license = ReleaseLicense("apache-2.0", stated=True, owed=False, text="")
    facts = facts_of(run.config, run.config.name, None, license)
    (folder / "card.md").write_text(str(make_card(facts, Scorecard(name=run.config.name), SAME)))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"shown", "config.json", "manifest.json", "ledger.jsonl"} <= {f.name for f in files}
    return sum(KEY.encode() in path.read_bytes() for path in files)


def passed(row: dict[str, Any]) -> bool:
    """Tell whether every promise was kept."""
    ended = sum(n for name, n in row.items() if name.startswith("stop_"))
    return (
        ended == row["questions"]
        and row["requests"] <= row["requests_allowed"]
        and row["bill_in_bounds"]
        and not (
            row["exit_code"]
            or row["unlabelled"]
            or row["asked_again_after_a_refusal"]
            or row["canary_found"]
        )
    )


def main() -> None:
    """Run one trial a seed, print the table, and exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--faults", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            row = trial(given.requests, given.faults, seed, given.concurrency, Path(folder))
        rows.append({"seed": seed, **row, "passed": passed(row)})
        for name, value in rows[-1].items():
            print(f"{name:36} {value}")
    stops = {status: stopped(status) for status in STOPPING}
    for status, row in stops.items():
        print(f"{status} stops the run{'':17} {row}")
    if given.json:
        given.json.write_text(json.dumps({"trials": rows, "stops": stops}, indent=2) + "\n")
    well = all(stopped_well(row) for row in stops.values())
    sys.exit(not (well and all(row["passed"] for row in rows)))


def stopped(status: int) -> dict[str, Any]:
    """Return the row of a status that stops a run."""
    with tempfile.TemporaryDirectory() as folder:
        return stopping_trial(status, Path(folder))


if __name__ == "__main__":
    main()
