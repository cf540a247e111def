"""Make the scorecard and the report of a run again: `python eval/report.py runs/quickstart`. Loads
no model."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *(sys.argv[1:] or ["runs/quickstart"]), "--redo"]))
