"""Leaves a process behind that belongs to nobody, and ends."""

import ctypes
import os
import time


def solve(host):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(1, 0)  # not with its parent
            ctypes.CDLL(None).prctl(15, host["mark"].encode())  # its name
            time.sleep(600)
        os._exit(0)
    time.sleep(0.1)
    return "left it"
