"""Loops for ever before it is asked anything."""

while True:
    pass
