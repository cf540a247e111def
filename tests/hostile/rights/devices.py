"""Opens memory, disks and the kernel's log, and makes the devices where they are missing."""

import os


def solve(host):
    for place, number in {"mem": (1, 1), "kmsg": (1, 11), "sda": (8, 0), "vda": (254, 0)}.items():
        try:
            open(f"/dev/{place}", "rb").close()
            return f"OUT {place}"
        except OSError:
            pass
        try:
            os.mknod(place, 0o60600, os.makedev(*number))
            return f"OUT: made {place}"
        except OSError:
            pass
    return "refused"
