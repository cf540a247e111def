"""Mounts over its folder, and makes the system's folders writable."""

import ctypes


def solve(host):
    mount = ctypes.CDLL(None).mount
    if mount(b"tmpfs", b".", b"tmpfs", 0, None) == 0 or mount(b"proc", b".", b"proc", 0, None) == 0:
        return "OUT: mounted"
    return "OUT: writable" if mount(None, b"/usr/lib", None, 0x1020, None) == 0 else "refused"
