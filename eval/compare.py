"""Compare two runs or two files of scores or answers: `python eval/compare.py A B`, as `distill
compare`. Loads no model."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
