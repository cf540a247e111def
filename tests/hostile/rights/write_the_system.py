"""Writes to Python's own library, and to every folder there is."""

import os


def solve(host):
    for folder in ("/", "/dev", "/lib", "/usr/lib", os.path.dirname(os.__file__)):
        try:
            with open(f"{folder}/was_here", "w"):
                return f"OUT {folder}"
        except OSError:
            pass
        try:
            os.chmod(folder, 0o777)
            return f"OUT {folder}"
        except OSError:
            pass
    return "refused"
