"""Every test, and every process it starts, computes on one thread: tiny models gain nothing from more, and waiting threads cost much on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
