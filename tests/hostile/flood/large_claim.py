"""Says that an answer of a million million bytes follows, and waits."""

import os
import time


def solve(host):
    os.write(4, (10**12).to_bytes(8, "big"))
    time.sleep(600)
