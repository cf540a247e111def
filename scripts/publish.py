"""Make RUN/release and, with --push OWNER/NAME, upload it: `python scripts/publish.py RUN [--push OWNER/NAME]`."""

import argparse
import sys
from pathlib import Path

from distill.cli import open_run
from distill.errors import exit_code
from distill.publishing.publish import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path, help="the folder of a run")
parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hub, private by default")
parser.add_argument("--public", action="store_true", help="make it public once it is complete")
parser.add_argument("--override", metavar="REASON", help="publish against the evidence")
parser.add_argument("--debug", action="store_true", help="show the traceback of a fault")


def publish(arguments: argparse.Namespace) -> None:
    """Publish the run under its lock."""
    run = open_run(arguments.run)
    with run.lock():
        main(run.config, run, arguments.push, arguments.public, arguments.override)


if __name__ == "__main__":
    chosen = parser.parse_args()
    sys.exit(exit_code(lambda: publish(chosen), chosen.debug))
