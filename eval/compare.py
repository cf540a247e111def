"""Compare two runs or two files of scores or answers: `python eval/compare.py A B`. Loads no model.

Runs that differ in their seed only make one side: `python eval/compare.py --a A1 A2 A3 --b B1 B2 B3`.
"""

import argparse
import sys
from pathlib import Path

from distill.errors import DistillError, Exit, exit_code
from distill.evaluation.compare import compare_paths


def main() -> None:
    """Print the paired differences, task by task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="A B")
    parser.add_argument("--a", nargs="+", type=Path, default=[], help="runs with other seeds")
    parser.add_argument("--b", nargs="+", type=Path, default=[])
    given = parser.parse_args()
    a, b = (given.paths[:1], given.paths[1:]) if len(given.paths) == 2 else (given.a, given.b)
    if not (a and b):
        raise DistillError(Exit.CONFIG, "compare", "needs two paths", "python eval/compare.py A B")
    print(compare_paths(a, b))


if __name__ == "__main__":
    sys.exit(exit_code(main))
