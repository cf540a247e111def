"""Measure each stage of this tree against the same stage of another commit, on real models.

    python scripts/benchmarks/benchmark_commits.py 07339c8 --repeats 3 --json commits.json

Both commits perform two small experiments by their own `distill run`, in turns, each time in an
empty folder: the quickstart's models and tasks; and soft labels of a 0.5B model for itself, which
are captured and then learnt from the cache. The seconds of a stage are those of its ledger; `steps`
are the optimizer steps of training alone, without loading and merging. A ratio above 1 says that
this tree is faster; its range is that of the pairs. Run nothing else meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from distill.storage.environment import environment
from distill.storage.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = {
    "corpus": {
        "source": "python-docs",
        "limit": 60,
        "chunk": {"max_chars": 1000},
        "split": {"validation": 8, "heldout": 14},
    },
    "prompts": {
        "tasks": ["summary", "api_json", "example"],
        "per_document": "rotate",
        "train": 24,
        "validation": 6,
        "heldout": 12,
    },
    "teacher": {"model": "qwen2.5-coder-0.5b-instruct", "max_new_tokens": 128},
    "student": {"model": "smollm2-135m-instruct"},
    "train": {"num_train_epochs": 2, "tokens_per_step": 1024, "load_best_model_at_end": False},
}
SOFT_LABELS = {
    **QUICKSTART,
    "prompts": {**QUICKSTART["prompts"], "train": 12, "validation": 3, "heldout": 3},
    "student": {"model": "qwen2.5-coder-0.5b-instruct"},
    "train": {**QUICKSTART["train"], "loss": {"ce": 0.5, "forward_kl": 0.5}},
}
STAGES = {  # what is compared, and of which experiment
    "quickstart": (QUICKSTART, ("generate", "steps", "train", "evaluate")),
    "soft labels": (SOFT_LABELS, ("signals", "steps", "train", "evaluate")),
}


def seconds_of_stages(tree: Path, config: dict[str, object]) -> dict[str, float]:
    """Perform an experiment with a tree's own code in an empty folder, and return each stage's
    seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small.yaml").write_text(yaml.safe_dump({"name": "small", **config}))
        subprocess.run(
            [sys.executable, "-m", "distill", "run", "small.yaml"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(tree)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        run = Path(folder) / "runs" / "small"
        entries = map(json.loads, (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines())
        steps = read_json(run / "training.json")["seconds"]
        return {"steps": steps, **{entry["stage"]: entry["seconds"] for entry in entries}}


def main() -> None:
    """Time both commits in turns, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what this tree is held against")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), arguments.commit], check=True)
        try:
            for _ in range(arguments.repeats):
                for name, (config, stages) in STAGES.items():
                    before, now = (seconds_of_stages(tree, config) for tree in (old, ROOT))
                    for stage in stages:
                        pairs[name, stage].append((before[stage], now[stage]))
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    table = Table("experiment", "stage", f"{arguments.commit}, s", "this tree, s", "ratio")
    rows = []
    for (name, stage), seconds in pairs.items():
        before, now = (statistics.median(side) for side in zip(*seconds, strict=True))
        ratios = [b / n for b, n in seconds]
        ratio, least, most = statistics.median(ratios), min(ratios), max(ratios)
        table.add_row(
            name, stage, f"{before:.1f}", f"{now:.1f}", f"{ratio:.2f} ({least:.2f} to {most:.2f})"
        )
        rows.append({"experiment": name, "stage": stage, "seconds": seconds, "ratio": ratio})
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"commit": arguments.commit, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
