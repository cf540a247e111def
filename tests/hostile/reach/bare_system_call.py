"""Asks the kernel for a socket without Python's help."""

import ctypes
import os


def solve(host):
    number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    return "OUT" if ctypes.CDLL(None).syscall(number, 2, 1, 0) >= 0 else "refused"
