"""Kill a run whose teacher an engine computes, or the engine, and continue it to its scorecard.

    python tests/faults/kill_engines.py --engine llama.cpp --kills 6 --json kills.json

The models are those of the quickstart, real, and so is the command, `distill run`. In turns the
run and the engine are killed with SIGKILL at a random moment after one to six answers came. No
engine may be left after it, a dead engine is one line and exit 4, what was stored stays as it was,
and at the end each prompt was answered once and the run has its scorecard.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.storage.files import read_json  # noqa: E402
from distill.storage.log import Log  # noqa: E402

SIZES = [  # of a run that takes two minutes
    "corpus.limit=60",
    "corpus.split={validation: 4, heldout: 10}",
    "prompts.train=30",
    "prompts.validation=3",
    "prompts.heldout=9",
    "train.num_train_epochs=1",
]
WAIT = 600.0  # seconds until an engine must have answered once more


def children(pid: int) -> list[int]:
    """Return the processes below one, at any depth."""
    parents = dict[int, int]()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(place.parent.name)] = int(words[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def alive(pids: list[int]) -> list[int]:
    """Return those that still run."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [p for p, s in states.items() if s.exists() and ") Z " not in s.read_text()]


def stored(store: Path) -> dict[str, str]:
    """Return the answers in the store by their keys; opening it checks every line, for repeats."""
    if not (store / "version.json").exists():
        return {}
    with Log(store, writable=False) as log:
        keys = log.index.get("response", {})
        return {key: json.dumps(log.get("response", key)) for key in keys}


def kill(command: list[str], folder: Path, engine_itself: bool, draw: random.Random) -> list[str]:
    """Start a run, kill it or its engine once an answer came; return what was wrong after it."""
    store, before = folder / "store/responses", stored(folder / "store/responses")
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline, more = time.monotonic() + WAIT, draw.randint(1, 6)
    while len(stored(store)) < len(before) + more and process.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"no answer within {WAIT:.0f} s, see {folder / 'log'}")
        time.sleep(0.2)
    time.sleep(draw.uniform(0, 3))
    family = children(process.pid)
    if process.poll() is not None or not family:
        return ["the run was over before it was killed: ask for fewer kills"]
    os.kill(family[-1] if engine_itself else process.pid, signal.SIGKILL)
    code, faults = process.wait(WAIT), list[str]()
    if engine_itself and code != 4:
        faults.append(f"exit {code} after the engine's death")
    time.sleep(3)
    if left := alive(family):
        faults.append(f"{len(left)} processes of the engine are left")
    after = stored(store)
    if lost := [key for key, text in before.items() if after.get(key) != text]:
        faults.append(f"{len(lost)} answers lost or altered")
    print(
        f"  {'engine' if engine_itself else 'run'} killed: {len(after)} answers stored", flush=True
    )
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--engine", choices=("llama.cpp", "vllm"), default="llama.cpp")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    draw, faults = random.Random(given.seed), list[str]()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        command = [sys.executable, "-m", "distill", "run", "configs/quickstart.yaml"]
        command += [f"runs={folder}", f"store={folder / 'store'}", f"teacher.engine={given.engine}"]
        command += SIZES
        started = time.monotonic()
        for number in range(given.kills):
            faults += kill(command, folder, number % 2 == 1, draw)
        with (folder / "log").open("ab") as log:
            code = subprocess.call(command, cwd=ROOT, stdout=log, stderr=log)
        run = folder / "quickstart"
        prompts = (run / "prompts.jsonl").read_text().splitlines()
        responses = (run / "responses.jsonl").read_text().splitlines() if code == 0 else []
        if code:
            faults.append(f"exit {code}: {(folder / 'log').read_text()[-2000:]}")
        elif len(responses) != len(prompts) or not (run / "scorecard.json").exists():
            faults.append(f"{len(responses)} answers to {len(prompts)} prompts")
        engine = read_json(run / "stages/generate.json")["fingerprint"]["engine"]
        found = {
            "engine": engine,
            "kills": given.kills,
            "prompts": len(prompts),
            "seconds": round(time.monotonic() - started),
            "faults": faults,
        }
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
