"""Connects to a socket that has a name and no file: only a network namespace hides it."""

import socket


def solve(host):
    with socket.socket(socket.AF_UNIX) as way:
        way.connect("\0" + host["abstract"])
        return "OUT"
