"""Looks for the processes of the host."""

import os


def solve(host):
    commands = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with open(f"/proc/{name}/cmdline") as file:
                commands.append(file.read())
    return f"OUT {len(commands)}"
