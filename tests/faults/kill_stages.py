"""Kill the pipeline at random moments of every stage, run it on, compare with an unbroken run.

    python tests/faults/kill_stages.py --kills 20 --json kills.json

The models are tiny and random, the stages and the store are the real ones. A run is killed with
SIGKILL, it and its children, at a random moment inside a stage, then the same command is given
again. Afterwards scorecard, answers, scores and adapter must be those of the unbroken run, times
aside; and what the store held at the kill must be in it still, once. Most runs are forked from a
process that has the libraries loaded; the first of every stage is the `distill` command itself.
`--store-kills` kills a writer of the store alone, many more times.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.cli import main as distill_main  # noqa: E402
from distill.storage.files import read_json, sha256_file  # noqa: E402
from distill.storage.log import Log  # noqa: E402

STAGES = ("corpus", "prompts", "generate", "filter", "train", "evaluate", "report")
# keys that hold time, or its price
TIMES = re.compile(r"loads|second|dollars|per_hour|^stages$|per_million|one_at_a_time|^economics")
WORDS = "the store keeps every answer that was paid for and a kill at any moment loses none".split()
DOCUMENTS = 20
TASKS = {
    "summary": {
        "metric": "one_sentence",
        "student": {"user": "Sum up:\n{{ document.text }}"},
        "checker": {"kind": "max_sentences", "max": 1},
    },
    "object": {
        "metric": "valid_json",
        "student": {"user": "As JSON with the key name:\n{{ document.text }}"},
        "checker": {"kind": "json_object", "keys": {"name": "string"}},
    },
}


class Trial(NamedTuple):
    """One kill: in which stage, how far into it, and what differed afterwards."""

    stage: str
    after: float
    seconds: float
    faults: list[str]


# --- the experiment


def prepare(folder: Path) -> Path:
    """Write tiny models, a corpus and the config: two tasks over notes, and lenient filters."""
    from tests.support.mortal import in_child
    from tests.support.tiny import make_tiny

    for name, seed in (("teacher", 1), ("student", 2)):
        if in_child(lambda name=name, seed=seed: make_tiny(folder / name, seed=seed)):
            raise SystemExit("the tiny models could not be made")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(DOCUMENTS):
        text = ". ".join(" ".join(draw.choices(WORDS, k=6)) for _ in range(2))
        (folder / "texts" / f"{number:02}.txt").write_text(f"Note {number}: {text}.\n")
    lenient = "truncated empty refusal repetition wrong_format failed_checker".split()
    split = {"validation": 4, "heldout": 6}
    tasks = [str(folder / f"{name}.yaml") for name in TASKS]
    tree: dict[str, Any] = {
        "name": "run",
        "runs": str(folder / "runs"),
        "corpus": {"path": str(folder / "texts"), "near_duplicate_threshold": None, "split": split},
        "prompts": {"tasks": tasks, "per_document": "rotate"},
        "teacher": {"model": str(folder / "teacher"), "max_new_tokens": 16},
        "terms": {"basis": "random weights made here"},
        "filters": dict.fromkeys(lenient, False),
        "student": {"model": str(folder / "student")},
        "train": {
            **{"num_train_epochs": 2, "tokens_per_step": 320, "eval_steps": 4, "save_steps": 2},
            "lora": {"r": 4, "alpha": 8},
        },
        "evaluation": {"bootstrap_samples": 200},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(tree))
    return config


# --- running and killing


def start(words: Sequence[str], log: Path, real: bool) -> int:
    """Start `distill WORDS` in a process group of its own; return its pid. Forked unless `real`."""
    if real:
        command = [sys.executable, "-m", "distill", *words]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
            ).pid
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            code = distill_main(words)
        finally:
            os._exit(code)
    return pid


def finish(words: Sequence[str], log: Path) -> None:
    """Run `distill WORDS` to its end, and stop here where it fails."""
    _, status = os.waitpid(start(words, log, real=False), 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: status {status}\n{log.read_text()[-3000:]}")


def kill_inside(words: Sequence[str], run: Path, stage: str, after: float, real: bool) -> bool:
    """Start a run, kill it `after` seconds into the stage; return whether the stage was running."""
    marker = run / "stages" / f"{stage}.json"
    pid = start(words, run / "log", real)
    while not marker.exists():
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise SystemExit(f"{stage} did not begin\n{(run / 'log').read_text()[-3000:]}")
        time.sleep(0.001)
    time.sleep(after)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return not read_json(marker)["finished"]


# --- comparing


def without_times(tree: Any) -> Any:
    """Leave out every key that holds a time or its price, at any depth."""
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if not TIMES.search(k)}
    return [without_times(child) for child in tree] if isinstance(tree, list) else tree


def lines(path: Path, times: bool = False) -> list[Any]:
    """Read a file of JSON lines, without what is time in them unless `times`."""
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return rows if times else without_times(rows)


def results(run: Path) -> dict[str, Any]:
    """Return everything of a finished run that may not depend on whether it was killed."""
    scores = {path.name: lines(path) for path in sorted((run / "scores").glob("*.jsonl"))}
    return {
        "scorecard": without_times(read_json(run / "scorecard.json")),
        "documents": lines(run / "documents.jsonl"),
        "prompts": lines(run / "prompts.jsonl"),
        "responses": lines(run / "responses.jsonl"),
        "adapter": sha256_file(run / "adapter" / "adapter_model.safetensors"),
        **scores,
    }


def stored(run: Path) -> dict[tuple[str, str], Any]:
    """Return every record of the run's store; opening it checks every line, and for repeats."""
    found = {}
    for version in sorted((run / ".store").glob("*/version.json")):
        with Log(version.parent, writable=False) as log:
            for kind, keys in log.index.items():
                found |= {
                    (f"{version.parent.name}/{kind}", key): log.get(kind, key) for key in keys
                }
    return found


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every value that is not the same in two trees."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path


def compare(run: Path, reference: Path, before: dict[tuple[str, str], Any]) -> list[str]:
    """Name what differs from the unbroken run, and what the store lost or holds too much."""
    expected, found = results(reference), results(run)
    faults = [f"{path} differs" for path in differing(expected, found)]
    after, whole = stored(run), stored(reference)
    faults += [f"lost {key}" for key in before if after.get(key) != before[key]]
    faults += [f"store lacks {key}" for key in whole.keys() - after.keys()]
    return faults + [f"store has too much: {key}" for key in after.keys() - whole.keys()]


# --- the trials


class Bench:
    """The unbroken run, and a copy of its folder from before each stage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, prepare(folder)
        self.reference = folder / "reference" / "run"
        self.reference.mkdir(parents=True)
        self.seconds: dict[str, float] = {}
        for stage in STAGES:
            shutil.copytree(self.reference, folder / "before" / stage)
            finish(self.words(stage, self.reference), self.reference / "log")
            self.seconds[stage] = lines(self.reference / "ledger.jsonl", times=True)[-1]["seconds"]

    def words(self, verb: str, run: Path) -> list[str]:
        """Return the command that runs a verb in a folder of its own, with a store of its own."""
        store = f"store={run / '.store'}"
        return [verb, str(self.config), f"name={run.name}", f"runs={run.parent}", store]

    def trial(self, stage: str, draw: random.Random, real: bool) -> Trial | None:
        """Kill a run inside the stage, run it on, and compare; None where the stage was over."""
        run = self.folder / "trial" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.copytree(self.folder / "before" / stage, run)
        started, after = time.monotonic(), draw.uniform(0, self.seconds[stage])
        if not kill_inside(self.words("run", run), run, stage, after, real):
            self.seconds[stage] *= 0.7  # it is faster than it was
            return None
        before = stored(run)
        finish(self.words("run", run), run / "log")
        faults = compare(run, self.reference, before)
        return Trial(stage, after, time.monotonic() - started, faults)

    def trials(self, stage: str, kills: int, real: int, seed: int) -> Iterator[Trial]:
        """Yield trials until `kills` have hit the stage; the first `real` are of the command."""
        draw, hits = random.Random(f"{stage} {seed}"), 0
        while hits < kills:
            if trial := self.trial(stage, draw, real=hits < real):
                hits += 1
                yield trial


def kill_writers(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill writers of one store at random moments; count records, and those that were lost."""
    draw, told = random.Random(seed), set[str]()
    for _ in range(kills):
        told |= kill_writer(folder, draw.randrange(2**60), draw.uniform(0.0005, 0.02))
    with Log(folder) as log:
        kept = {key: log.get("response", key) for key in log.keys("response")}
    wrong = sum(body != {"text": key * 20} for key, body in kept.items())
    torn = len(list((folder / "torn").glob("*")))
    return {
        "kills": kills,
        "records": len(kept),
        "lost": len(told - kept.keys()),
        "wrong": wrong,
        "torn": torn,
    }


def kill_writer(folder: Path, seed: int, after: float) -> set[str]:
    """Start a process that appends records, kill it `after` seconds; return the keys it stored."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        draw = random.Random(seed)
        try:
            with Log(folder) as log:
                while True:  # groups of one to eight records; each key once `append` has returned
                    names = [f"{draw.randrange(2**64):016x}" for _ in range(draw.randint(1, 8))]
                    log.append(("response", name, {"text": name * 20}) for name in names)
                    os.write(writer, "".join(names).encode())
        finally:
            os._exit(70)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        first = told.read(16)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        keys = first + told.read()
    if os.waitpid(pid, 0)[1] != signal.SIGKILL:
        raise SystemExit("the writer failed before it was killed")
    return {keys[i : i + 16].decode() for i in range(0, len(keys) - 15, 16)}


def load_libraries() -> None:
    """Import what every stage needs, so that forks begin at once. No tensor is made before one."""
    from importlib import import_module

    modules = (
        "corpus.corpus corpus.prompts generation.generate generation.filters training.train "
        "evaluation.evaluate report.report"
    )
    for module in modules.split():
        import_module(f"distill.{module}")


def table(trials: Sequence[Trial], show: Callable[[str], None] = print) -> None:
    """Print a row a stage: kills that hit, runs that ended the same, the moments of the kills."""
    show(f"{'stage':10} {'kills':>6} {'same':>6} {'different':>10}   moment of the kill, seconds")
    for stage in dict.fromkeys(trial.stage for trial in trials):
        rows = [trial for trial in trials if trial.stage == stage]
        bad = sum(bool(trial.faults) for trial in rows)
        moments = sorted(trial.after for trial in rows)
        span = f"{moments[0]:.2f} to {moments[-1]:.2f}"
        show(f"{stage:10} {len(rows):6} {len(rows) - bad:6} {bad:10}   {span}")
    for fault, count in Counter(f for trial in trials for f in trial.faults).most_common(10):
        show(f"{count} x {fault[:120]}")


def main() -> int:
    """Run the trials, print the table, write the JSON; return 1 where any ended differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills a stage")
    parser.add_argument(
        "--real", type=int, default=1, help="how many of them of the command itself"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--store-kills", type=int, default=0, help="kills of a writer of the store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    store, trials, seconds = dict[str, int](), list[Trial](), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        if options.store_kills:
            store = kill_writers(Path(name) / "store", options.store_kills, options.seed)
            print("store: " + ", ".join(f"{count} {what}" for what, count in store.items()))
        if options.kills:
            load_libraries()
            bench = Bench(Path(name))
            seconds = dict(bench.seconds)
            for stage in options.stages:
                trials += bench.trials(stage, options.kills, options.real, options.seed)
            table(trials)
    if options.json:
        rows = [trial._asdict() for trial in trials]
        figures = {"store": store, "stages": seconds, "trials": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    bad = store.get("lost", 0) + store.get("wrong", 0)
    return int(bad > 0 or any(trial.faults for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
