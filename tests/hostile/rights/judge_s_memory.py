"""Reads and stops the process above it: by /proc, by a call that copies memory, by tracing it."""

import ctypes
import os

LIBC = ctypes.CDLL(None)


def solve(host):
    for process in {1, os.getppid()}:
        room = ctypes.create_string_buffer(64)
        parts = (ctypes.c_void_p * 2)(ctypes.addressof(room), 64)
        if LIBC.process_vm_readv(process, parts, 1, parts, 1, 0) > 0:
            return "OUT: read it"
        if LIBC.ptrace(0x4206, process, 0, 0) == 0:
            return "OUT: traced it"
        if os.path.exists(f"/proc/{process}/fd"):
            return "OUT: saw it"
    return "refused"
