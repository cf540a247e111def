"""Look for items in a corpus: `python eval/contamination.py ITEMS CORPUS`. Each is a file or folder that can be read."""

import sys
from pathlib import Path

from distill.corpus.contamination import NOT_FOUND, compare_files
from distill.errors import DistillError, Exit, exit_code


def main() -> None:
    """Print each item that was found, where, and the words."""
    if len(sys.argv) != 3:
        what, fix = "needs two paths", "python eval/contamination.py ITEMS CORPUS"
        raise DistillError(Exit.CONFIG, "contamination", what, fix)
    items, found = compare_files(Path(sys.argv[1]), Path(sys.argv[2]))
    for item, (match, *_) in found.items():
        print(f"{item}  in {match.place}: {match.phrase[:120]}")
    print(f"{len(found)} of {len(items)} items are in the corpus. {NOT_FOUND}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
