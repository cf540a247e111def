"""Put the probes to the judge of a config: `python eval/probe.py CONFIG`, as `distill probe`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
