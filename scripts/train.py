"""Train the student of a run: `python scripts/train.py CONFIG [key=value ...]`, or the same after
`accelerate launch`.

The same stage as `distill train CONFIG`; with several processes the first does the stage, the
others join its work.
"""

import sys

from distill.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
