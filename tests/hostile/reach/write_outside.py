"""Writes a file where it has no business."""


def solve(host):
    with open(host["outside"], "w") as file:
        file.write("was here")
    return "OUT"
