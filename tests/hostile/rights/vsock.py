"""Talks to the host of this virtual machine: a family of sockets without namespaces."""

import socket


def solve(host):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM):
        return "OUT"
