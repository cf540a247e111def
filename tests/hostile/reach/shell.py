"""Starts a shell."""

import subprocess


def solve(host):
    return subprocess.run(["/bin/sh", "-c", "echo OUT"], capture_output=True, text=True).stdout
