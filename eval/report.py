"""Make the scorecard of a run again: `python eval/report.py runs/quickstart`. Loads no model."""

import sys
from pathlib import Path

from distill.errors import exit_code
from distill.evaluation.report import remake


def main() -> None:
    """Write the three files and show the scorecard."""
    report = remake(Path(sys.argv[1] if len(sys.argv) == 2 else "runs/quickstart"))
    print(report.with_name("scorecard.md").read_text(encoding="utf-8"))
    print(f"report: {report}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
