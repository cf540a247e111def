"""Look for items in a corpus: `python eval/contamination.py ITEMS CORPUS`, as `distill
contamination`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["contamination", *sys.argv[1:]]))
