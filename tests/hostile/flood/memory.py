"""Takes 10 GB at once, and then bit by bit."""


def solve(host):
    kept = []
    try:
        kept.append(bytearray(10 << 30))
        return "OUT"
    except MemoryError:
        pass
    while True:
        kept.append(bytearray(1 << 20))
