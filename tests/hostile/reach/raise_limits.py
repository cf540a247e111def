"""Takes its limits off."""

import resource


def solve(host):
    most = 1 << 40
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return "OUT"
