"""Reads the folder that it was started from, and that of the code which checks it."""

import os


def solve(host):
    folder = host["repository"]
    return "OUT" if os.path.exists(f"{folder}/pyproject.toml") or os.listdir(folder) else ""
