"""Prints without end."""


def solve(host):
    while True:
        print("y" * 1_000_000)
