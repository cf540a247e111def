"""Measure the store: durable appends a second, opening time and memory at a million records, random
reads.

    python scripts/benchmarks/benchmark_store.py --records 1000000 --json store.json

Prints a table, and writes the figures as JSON where asked. The store is made in a temporary folder.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill.storage.log import Log

HERE = str(Path(__file__).parent)
CHILD = f"import sys; sys.path.insert(0, {HERE!r}); import benchmark_store as b; b.child({{!r}})"


def body(number: int, size: int) -> dict[str, str]:
    """Return a record body of about `size` bytes, different for every number."""
    return {"id": f"{number:032x}", "text": f"{number} " + "answer " * (size // 7)}


def fill(folder: Path, records: int, size: int, group: int) -> float:
    """Append `records` records with one fsync a group, and return the seconds."""
    started = time.perf_counter()
    with Log(folder) as log:
        for first in range(0, records, group):
            numbers = range(first, min(first + group, records))
            log.append(("response", f"{n:032x}", body(n, size)) for n in numbers)
    return time.perf_counter() - started


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(folder: str, reads: int = 10_000) -> None:
    """Open the store as a writer in this process, read at random, and print the figures as JSON."""
    before, started = resident(), time.perf_counter()
    with Log(Path(folder)) as log:
        opened, after = time.perf_counter() - started, resident()
        keys = random.Random(0).choices(list(log.keys("response")), k=reads)
        started = time.perf_counter()
        for key in keys:
            log.get("response", key)
        rate = reads / (time.perf_counter() - started)
    figures = {
        "open_seconds": opened,
        "index_megabytes": (after - before) / 1e6,
        "reads_per_second": rate,
    }
    print(json.dumps(figures))


def measure(records: int, size: int, group: int, repeats: int) -> dict[str, float]:
    """Fill a store and open it `repeats` times, each in a new process; return medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "responses"
        seconds = fill(folder, records, size, group)
        stored = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        command = [sys.executable, "-c", CHILD.format(str(folder))]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(repeats)]
    middle = {key: sorted(run[key] for run in runs)[repeats // 2] for key in runs[0]}
    durable = {"appends_per_second": records / seconds, "stored_megabytes": stored / 1e6}
    return {"records": records, "body_bytes": size, "group": group, **durable, **middle}


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1000, help="bytes of a body")
    parser.add_argument("--group", type=int, default=1000, help="records an fsync")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.records, options.size, options.group, options.repeats)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):20} {value:>14,.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
