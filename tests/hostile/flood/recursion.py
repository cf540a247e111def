"""Calls itself until the stack is gone."""

import sys


def solve(host):
    sys.setrecursionlimit(10**9)
    return [solve(host)]
