"""Writes 10 GB into its folder, in one file and in many."""


def solve(host):
    written = 0
    for number in range(1000):
        try:
            with open(f"{number}.bin", "wb", buffering=0) as file:
                for _ in range(10):
                    written += file.write(b"x" * (1 << 20))
        except OSError:
            return f"{'OUT' if written > 64 << 20 else 'refused'} after {written}"
    return "OUT"
