"""Write the scorecards that README.md and docs/*.md show, from eval/results: `python eval/readme.py`. Loads no model."""

import sys
from pathlib import Path

from distill.errors import exit_code
from distill.report.readme import write


def main() -> None:
    """Fill the pages."""
    write(Path(__file__).parent.parent)


if __name__ == "__main__":
    sys.exit(exit_code(main))
