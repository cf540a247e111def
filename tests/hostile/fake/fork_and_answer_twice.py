"""Lets one of two processes fail and the other end well."""

import os


def solve(host):
    if os.fork():
        os._exit(0)
    return 0
