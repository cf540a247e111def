"""Asks the kernel which rights it has, and takes all of them."""

import ctypes
import struct


def solve(host):
    libc, header = ctypes.CDLL(None), struct.pack("Ii", 0x20080522, 0)
    room = ctypes.create_string_buffer(24)
    libc.capget(header, room)
    if any(room.raw) or libc.capset(header, struct.pack("6I", *[0xFFFFFFFF] * 6)) == 0:
        return "OUT"
    return "none"
