"""Looks a name up, which sends data out even where nothing answers."""

import socket


def solve(host):
    return f"OUT {socket.getaddrinfo('example.com', 80)}"
