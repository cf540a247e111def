"""Compare two runs or two files of scores or answers: `python eval/compare.py A B`. Loads no model."""

import sys
from pathlib import Path

from distill.errors import DistillError, Exit, exit_code
from distill.evaluation.compare import compare_paths


def main() -> None:
    """Print the paired differences, task by task."""
    if len(sys.argv) != 3:
        raise DistillError(Exit.CONFIG, "compare", "needs two paths", "python eval/compare.py A B")
    print(compare_paths(Path(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(exit_code(main))
