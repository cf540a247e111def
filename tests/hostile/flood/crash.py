"""Reads where there is nothing, and dies of it."""

import ctypes


def solve(host):
    return ctypes.string_at(0)
