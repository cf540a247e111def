"""The `distill` command, and `python -m distill`."""

import os
import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is still imported is one line too."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a stream that a shell closed: else a file of ours would be what others print to
    sys.stdout = sys.stdout or os.fdopen(nowhere, "w")
    sys.stderr = sys.stderr or os.fdopen(os.dup(nowhere), "w")
    try:
        from distill.cli import main as command
    except KeyboardInterrupt:
        print("interrupted (nothing had begun)", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
