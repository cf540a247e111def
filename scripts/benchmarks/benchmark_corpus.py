"""Measure the stages corpus and prompts on a corpus of a real size: seconds and peak memory.

    python scripts/benchmarks/benchmark_corpus.py [documents notes million] [--json corpus.json]

`documents` are 112 MB in 20,000 documents, `notes` 100,000 texts of 140 bytes, `million` ten times
as many. Texts are made of one vocabulary whose words are as uneven as those of a language (Zipf);
one in a hundred nearly repeats an earlier one, one in fifty holds an address or a key. Both stages
run in one process of their own, as `distill run` does them. The ids of what they make are hashed,
so that two commits can be compared: `PYTHONPATH=OTHER python scripts/benchmarks/...`.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from distill.storage.files import write_json
from distill.storage.progress import console

SIZES = {"documents": (20_000, 5_600), "notes": (100_000, 140), "million": (1_000_000, 140)}
ADDRESSES = (
    "write to {name}@mail.corp.com or call +1 212 736 {n:04d}",
    "the token is ghp_{n:036d}",
    "see https://example.org/{name}?id={n} for more",
)
CONFIG = """name: r
runs: {folder}/runs
corpus: {{path: {folder}/rows.jsonl}}
prompts: {{tasks: [summary]}}
teacher: {{model: t}}
student: {{model: s}}
"""
CHILD = """
import json, resource, sys, time
from distill.cli import main
seconds = []
for stage in ("corpus", "prompts"):
    started = time.perf_counter()
    if code := main([stage, sys.argv[1]]):
        sys.exit(code)
    seconds.append(time.perf_counter() - started)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak_mb": int(peak.split()[1]) / 1000}))
"""


def make_rows(path: Path, count: int, size: int) -> None:
    """Write a file of rows, always the same for one count and size."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(1, 12, 40_000)
    vocabulary = ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]
    shares = 1 / (np.arange(len(vocabulary)) + 2)
    ranks = np.cumsum(shares / shares.sum())
    earlier: list[list[str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            drawn = np.searchsorted(ranks, rng.random(size // 4))
            words = [vocabulary[min(rank, len(vocabulary) - 1)] for rank in drawn]
            if number % 100 == 99:
                words = [*earlier[number % len(earlier)][:-1], "changed"]
            elif number % 100 == 0 and len(earlier) < 200:
                earlier.append(words)
            for place in range(9, len(words), 12):
                words[place] = f"{words[place].capitalize()}."
            if number % 50 == 7:
                words[1] = ADDRESSES[number // 50 % 3].format(name=words[0].lower(), n=number)
            text = " ".join(words)[:size]
            file.write(json.dumps({"id": f"d{number}", "title": words[2], "text": text}) + "\n")


def measure(kind: str, folder: Path) -> dict[str, object]:
    """Run both stages on one kind of corpus; return what they took and a hash of their ids."""
    make_rows(folder / "rows.jsonl", *SIZES[kind])
    config = folder / "r.yaml"
    config.write_text(CONFIG.format(folder=folder))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(config)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ids, rows = hashlib.sha256(), 0
    for name in ("documents", "prompts"):
        for line in (folder / "runs" / "r" / f"{name}.jsonl").open(encoding="utf-8"):
            ids.update(json.loads(line)["id"].encode())
            rows += 1
    facts = json.loads(child.stdout.splitlines()[-1])
    facts["seconds"] = [round(seconds, 1) for seconds in facts["seconds"]]
    totals = {"wall": round(wall, 1), "cpu": round(cpu, 1), "rows": rows}
    return {**totals, **facts, "ids": ids.hexdigest()[:16]}


def main() -> None:
    """Measure the kinds that are named, or the two that take under a minute or two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=["documents", "notes"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table("corpus", "seconds", "CPU seconds", "corpus, prompts", "peak MB", "ids")
    results: dict[str, dict[str, object]] = {}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            row = results[kind] = measure(kind, Path(folder))
        columns = (row[name] for name in ("wall", "cpu", "seconds", "peak_mb", "ids"))
        table.add_row(kind, *map(str, columns))
    console.print(table)
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
