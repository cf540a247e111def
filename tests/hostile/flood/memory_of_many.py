"""Takes as much memory as one process may, in each of many."""

import os
import time


def solve(host):
    for _ in range(20):
        if os.fork() == 0:
            kept = bytearray(b"x") * (200 << 20)
            time.sleep(600)
            os._exit(len(kept) & 1)
    time.sleep(600)
