"""Kills a process of the host by its number."""

import os
import signal


def solve(host):
    os.kill(host["neighbour"], signal.SIGKILL)
    return "OUT"
