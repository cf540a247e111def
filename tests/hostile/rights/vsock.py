"""Talks to the machine that this virtual machine runs on: a family of sockets without namespaces."""

import socket


def solve(host):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM):
        return "OUT"
