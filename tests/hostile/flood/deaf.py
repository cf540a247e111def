"""Ignores every signal that can be ignored, and sleeps."""

import signal
import time


def solve(host):
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            pass
    while True:
        time.sleep(1000)
