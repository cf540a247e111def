"""Writes rubbish to the judge without end."""

import os


def solve(host):
    while True:
        os.write(4, b"\xff" * 65_536)
