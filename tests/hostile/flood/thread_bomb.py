"""Starts threads without end."""

import threading
import time


def solve(host):
    while True:
        try:
            threading.Thread(target=time.sleep, args=(600,)).start()
        except RuntimeError:
            pass
