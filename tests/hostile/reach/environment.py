"""Looks for secrets in the environment: Python's copy, the C library's, and the kernel's."""

import ctypes
import os


def solve(host):
    found = str(dict(os.environ))
    pointer = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    place = 0
    while pointer and pointer[place]:
        found += pointer[place].decode()
        place += 1
    for process in ("self", "1", str(os.getppid())):
        try:
            found += open(f"/proc/{process}/environ").read()
        except OSError:
            continue
    return "OUT" if host["secret"] in found else ""
