"""Score a responder on a suite: `python eval/run.py forgetting --responder runs/quickstart`, as
`distill score`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
