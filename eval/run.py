"""Score a responder on a suite: `python eval/run.py forgetting --responder runs/quickstart`. See distill/evaluation/score.py."""

import argparse
import sys
from pathlib import Path

from distill.errors import exit_code
from distill.evaluation.score import Place, score
from distill.evaluation.suites import load_suite
from distill.tasks.sandbox.programs import allow

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "suite", help="a name of eval/suites, a suite's .yaml, or a run (its held-out prompts)"
)
parser.add_argument(
    "--responder", required=True, help="a run, a model, a config, or a file of answers"
)
parser.add_argument("--data", type=Path, help="questions from a file instead of the Hub")
parser.add_argument("--name", help="what the responder is called in files and tables")
parser.add_argument(
    "--store", type=Path, default=Path("runs/.store/responses"), help="shared answers"
)
parser.add_argument("--out", type=Path, default=Path("runs/.suites"), help="for scores and answers")
parser.add_argument(
    "--allow-code", action="store_true", help="run generated programs, in a sandbox"
)
parser.add_argument("--debug", action="store_true", help="show the traceback of a fault")


def main(arguments: argparse.Namespace) -> None:
    """Ask, score, write and print."""
    if arguments.allow_code:
        allow("sandbox")
    place = Place(arguments.store, arguments.out)
    suite = load_suite(arguments.suite, arguments.data)
    print(score(suite, arguments.responder, arguments.name, place))


if __name__ == "__main__":
    chosen = parser.parse_args()
    sys.exit(exit_code(lambda: main(chosen), chosen.debug))
