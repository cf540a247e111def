"""Wants to be traced, the first step of tracing somebody else."""

import ctypes


def solve(host):
    return "OUT" if ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 else "refused"
