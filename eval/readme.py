"""Write the scorecards that README.md and docs/*.md show anew: `python eval/readme.py`, as `distill
tables`."""

import sys
from pathlib import Path

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["tables", *(sys.argv[1:] or [str(Path(__file__).parent.parent)])]))
