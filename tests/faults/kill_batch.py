"""Kill a client of a batch interface at twenty moments, one run after the other, and count.

    python tests/faults/kill_batch.py

`distill generate` asks 200 questions by batch. It is killed with SIGKILL at chosen moments of the
server (before and after the upload, before and after the submission is executed, while the job
waits, while results come) and at chosen calls that change the disk. Each go continues where the
last one died. At the end each question is answered and was executed once, the bill is what the
store says is settled, and the ledger's sums are the store's.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.records import Response  # noqa: E402
from distill.responders.endpoint import batch  # noqa: E402
from distill.responders.endpoint.budget import account  # noqa: E402
from distill.responders.store import ResponseStore  # noqa: E402
from distill.storage.environment import environment  # noqa: E402
from distill.storage.files import read_records  # noqa: E402
from distill.storage.run_folder import open_run  # noqa: E402
from tests.faults.kill_buyer import CONTEXT, MEMORY, PRELOADED, generate  # noqa: E402
from tests.support.batch_server import HALF_PRICE, BatchServer  # noqa: E402
from tests.support.buying import make_run  # noqa: E402
from tests.support.fake_teacher import text_of  # noqa: E402

# Moments of the server, or numbers of calls that change the disk ("half": within that write)
KILLS: dict[str, tuple[str | int, ...]] = {
    "openai": (
        *("POST /files comes", "POST /files done", "POST /batches comes"),
        *("GET /batches list done", "GET /batches done", "GET /files/content half"),
        *(0, 20, 24, 28, "half 8", "half 10", "POST /batches done", "GET /batches list half"),
        *("GET /files/content done", 22, 26, "POST /files half", "POST /batches half", 30),
    ),
    "anthropic": (
        *("POST /messages/batches comes", "GET /messages/batches list done"),
        *("GET /messages/batches done", "GET /messages/batches/results half"),
        *(0, 20, 24, 28, "half 8", "half 10", "POST /messages/batches done"),
        *("GET /messages/batches list half", "GET /messages/batches half"),
        *("GET /messages/batches/results done", 22, 26, 30, "POST /messages/batches half"),
        *("GET /messages/batches list comes", 32),
    ),
}

environment()  # found once, and not by every child of the process that has this loaded


def go(config: Path, count: int, half: bool, log: Path) -> None:
    """Be `distill generate CONFIG` with less patience, and die at a call that changes the disk."""
    batch.GRACE = 0.05  # the killed client's requests have been answered before
    generate(config, count, half, log)


def killed(place: Path, questions: int, form: str = "openai") -> Counter[str]:
    """Kill one run at every moment, let it end, and return what should not be, and the kills."""
    CONTEXT.set_forkserver_preload([*PRELOADED, "tests.faults.kill_batch"])
    with BatchServer(place / "books") as server:
        config = make_run(place, server.url, questions, batch=True, wire=form, initial_backoff=0.02)
        table = json.dumps({"tokens": [HALF_PRICE.model_dump(mode="json")]})
        (place / "prices.yaml").write_text(table)
        run, log = open_run(config), place / "shown"
        store = run.config.store_folder() / "responses"
        stored, faults = set[str](), Counter[str]()
        late = Counter({f"q{i} please": i % 4 for i in range(questions)})

        def fate(asked: str) -> str:
            """Let the questions expire up to three times."""
            late[asked] -= 1
            return "answer" if late[asked] < 0 else "expired"

        server.fate = fate

        def attempt(moment: str = "", call: int = -1, half: bool = False) -> bool:
            nonlocal stored
            child = CONTEXT.Process(target=go, args=(config, call, half, log))
            server.watch = lambda now: child.kill() if now == moment else None
            child.start()
            child.join(60)
            while server.busy:
                time.sleep(0.005)
            if child.exitcode not in (0, -9):
                raise SystemExit(f"status {child.exitcode} at {moment or call}: {log.read_text()}")
            faults["kills"] += child.exitcode == -9
            if "-v" in sys.argv:
                print(moment or f"call {call}", child.exitcode, server.requests, flush=True)
            if store.exists():
                with ResponseStore(store, writable=False) as opened:
                    now = set(opened.keys("response"))
                    sums = account(opened, {"fake-1": HALF_PRICE})
                faults["lost"] += len(stored - now)
                most = sums.settled + sums.unknown_most
                faults["bill out of bounds"] += not sums.settled <= server.bill <= most
                stored = now
            return child.exitcode == 0

        for kill in KILLS[form]:
            half = str(kill).startswith("half ")
            if isinstance(kill, int) or half:
                attempt(call=int(str(kill).removeprefix("half ")), half=half)
            else:
                attempt(kill)
        if not attempt():
            raise SystemExit("it was killed, and nobody killed it")
        answers = [r.text for r in read_records(run.path("responses.jsonl"), Response)]
        faults["missing"] += answers != [text_of(f"q{i} please") for i in range(questions)]
        faults["paid twice"] += sum(server.paid.values()) - questions
        with ResponseStore(store, writable=False) as opened:
            sums = account(opened, {"fake-1": HALF_PRICE})
            faults["jobs left open"] += len(list(opened.jobs()))
        faults["bill is not what is settled"] += server.bill != sums.settled
        faults["in doubt"] += sums.unknown
        entries = run.ledger.entries()
        ledger = sum((entry.dollars or Decimal(0) for entry in entries), Decimal(0))
        faults["ledger is not the store"] += ledger != sums.settled
        faults["traceback"] += "Traceback" in log.read_text()
        return faults


def main() -> None:
    """Kill, print the table, and exit with 1 for a broken promise."""
    bad = 0
    for form in KILLS:
        with tempfile.TemporaryDirectory(dir=MEMORY) as place:
            row = killed(Path(place), 200, form)
        print(form, dict(row))
        bad += sum(count for name, count in row.items() if name != "kills")
    sys.exit(bool(bad))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
