"""Leaves its folder by a link, and by way of the folder above."""

import os


def solve(host):
    os.symlink(host["outside"], "link")
    for path in ("link", "../" * 20 + host["outside"].lstrip("/")):
        with open(path, "w") as file:
            file.write("was here")
    return "OUT"
