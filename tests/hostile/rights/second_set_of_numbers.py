"""Makes a system call by the number of another interface (x32), which filters have forgotten."""

import ctypes
import os


def solve(host):
    if os.uname().machine != "x86_64":
        return "no such interface"
    return "OUT" if ctypes.CDLL(None).syscall(41 | 0x40000000, 2, 1, 0) >= 0 else "refused"
