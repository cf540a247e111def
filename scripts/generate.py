"""Let the local teacher of a run answer on several GPUs: `accelerate launch --multi_gpu
--num_processes N scripts/generate.py CONFIG`.

The same stage, and the same answers, as `distill generate CONFIG`; the first process does the
stage, the others join it.
"""

import sys

from distill.launch import main

if __name__ == "__main__":
    sys.exit(main("generate", sys.argv[1:]))
