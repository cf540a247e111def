"""The `distill` command, and `python -m distill`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is still imported is one line too."""
    try:
        from distill.cli import main as command
    except KeyboardInterrupt:
        print("interrupted (nothing had begun)", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
