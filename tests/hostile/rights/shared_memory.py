"""Takes memory that belongs to no process: segments, queues, files without a name."""

import ctypes
import os


def solve(host):
    libc = ctypes.CDLL(None)
    if libc.shmget(0, 1 << 30, 0o1600) >= 0 or libc.msgget(0, 0o1600) >= 0:
        return "OUT"
    try:
        return f"OUT {os.memfd_create('x')}"
    except OSError:
        return "refused"
