"""Put the probes to the judge of a config: `python eval/probe.py CONFIG 'evaluation.judge={kind: local, model: MODEL}'`."""

import argparse
import sys
from pathlib import Path

from distill.config_file import load_config
from distill.errors import exit_code
from distill.evaluation.judging import probe_lines, probed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("config", type=Path)
parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
parser.add_argument("--debug", action="store_true", help="show the traceback of a fault")


def main(arguments: argparse.Namespace) -> None:
    """Ask, and print what came of it."""
    for line in probe_lines(probed(load_config(arguments.config, arguments.overrides))):
        print(line)


if __name__ == "__main__":
    chosen = parser.parse_args()
    sys.exit(exit_code(lambda: main(chosen), chosen.debug))
