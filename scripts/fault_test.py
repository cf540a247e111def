"""Ask a faulty teacher thousands of questions, and count what became of each of them and of the money.

    python scripts/fault_test.py --requests 10000 --faults 0.2 --json faults.json

The teacher is the test suite's: a real HTTP server on a loopback port, with a bill of its own. Of its replies the given
share is a fault, drawn at random from all kinds that a run survives. Afterwards every question must be answered or
labelled failed, none of 400 and 422 asked twice, the canary key in no byte that was written, and the teacher's bill
between what is settled and that plus the maximum of what is unknown.
"""

import argparse
import json
import os
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
from distill.generation.budget import Account, account  # noqa: E402
from distill.generation.endpoint import EndpointResponder  # noqa: E402
from distill.generation.generate import answer_all  # noqa: E402
from distill.generation.responder import Request, Sampling  # noqa: E402
from distill.records import Message, Response  # noqa: E402
from distill.store import Log  # noqa: E402
from tests.fake_teacher import PRICE, FakeTeacher, Reply, bomb, question  # noqa: E402

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


def settings_for(teacher: FakeTeacher, concurrency: int) -> Teacher:
    """Return the settings of a patient client with short timeouts."""
    os.environ["FAULT_TEST_KEY"] = KEY
    return Teacher.model_validate(
        {
            "kind": "endpoint",
            "model": "fake-1",
            "base_url": teacher.url,
            "api_key_env": "FAULT_TEST_KEY",
            "max_new_tokens": 40,
            "concurrency": concurrency,
            "read_timeout": 1,
            "total_timeout": 3,
            "first_wait": 0.02,
            "max_body_bytes": 1_000_000,
        }
    )


def trial(count: int, share: float, seed: int, concurrency: int, folder: Path) -> dict[str, Any]:
    """Ask `count` questions of a teacher that fails at a share of requests; return the counts."""
    faulty = Faulty(share, seed)
    with FakeTeacher(faulty) as teacher:
        settings = settings_for(teacher, concurrency)
        sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        origin = origin_of(settings)
        requests = [
            Request.make(origin, str(i), (Message(role="user", content=f"question {i}"),), sampling)
            for i in range(count)
        ]
        started, cpu = time.monotonic(), time.process_time()
        responses = answer_all(EndpointResponder(settings, PRICE, "t"), requests, folder, "asking")
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    with Log(folder, writable=False) as log:
        found = account(log, PRICE, "t")
        stored = sum(1 for _ in log.keys("response"))
    return {
        **outcomes(responses),
        **money(found, teacher),
        "questions": count,
        "stored": stored,
        "requests": len(teacher.payloads),
        "requests_allowed": count * (1 + settings.max_retries),
        "faults": sum(faulty.drawn.values()),
        "fault_kinds": len(faulty.drawn),
        "asked_again_after_a_refusal": faulty.again,
        "canary_found": canary(folder, responses),
        "seconds": round(seconds, 1),
        "cpu_seconds_of_client_and_teacher": round(cpu, 1),
    }


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


def canary(folder: Path, responses: list[Response]) -> int:
    """Count the files and answers that hold the key."""
    files = sum(KEY.encode() in p.read_bytes() for p in folder.rglob("*") if p.is_file())
    return files + sum(KEY in response.to_line() for response in responses)


def passed(row: dict[str, Any]) -> bool:
    """Tell whether every promise was kept."""
    ended = sum(n for name, n in row.items() if name.startswith("stop_"))
    return (
        ended == row["questions"]
        and row["requests"] <= row["requests_allowed"]
        and row["bill_in_bounds"]
        and not (row["unlabelled"] or row["asked_again_after_a_refusal"] or row["canary_found"])
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
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
