"""Make RUN/release and, with --push OWNER/NAME, upload it: `python scripts/publish.py RUN`, as
`distill publish`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
