"""Reads who has an account, and where it may their passwords."""


def solve(host):
    found = ""
    for path in ("/etc/passwd", "/etc/shadow", "/proc/1/root/etc/passwd"):
        try:
            found += open(path).read()
        except OSError:
            continue
    return "OUT" if "root" in found else ""
