"""Makes files without end."""


def solve(host):
    for number in range(1_000_000):
        try:
            open(f"f{number}", "w").close()
        except OSError:
            return f"refused after {number}"
    return "OUT"
