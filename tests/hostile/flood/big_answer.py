"""Answers with more than can be held."""


def solve(host):
    return ["y" * (64 << 20)]
