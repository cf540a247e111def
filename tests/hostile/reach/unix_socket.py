"""Connects to a socket in the host's file system, as a container's daemon has one."""

import socket


def solve(host):
    with socket.socket(socket.AF_UNIX) as way:
        way.connect(host["unix"])
        return "OUT"
