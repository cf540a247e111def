"""Complains without end, by the descriptor."""

import os


def solve(host):
    while True:
        os.write(2, b"y" * 1_000_000)
