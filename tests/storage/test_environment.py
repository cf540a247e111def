"""As many processes as asked, or none; and a first signal that lets the step finish."""

import os
import signal

import pytest

from distill.errors import DistillError, Exit
from distill.storage import environment
from distill.storage.environment import check_world, interruptible

LAUNCH = "/usr/bin/python\0/usr/bin/accelerate\0launch\0--cpu\0--num_processes\0{}\0train.py\0"


@pytest.mark.parametrize(
    ("stated", "command", "world", "fits"),
    [
        (2, "", 1, False),
        (1, "", 2, False),
        (None, LAUNCH.format(2), 1, False),
        (None, LAUNCH.format(1), 2, False),
        (None, "", 1, True),
        (2, LAUNCH.format(2), 2, True),
        (None, "torchrun\0--nproc-per-node=4\0train.py\0", 4, True),
        (None, "bash\0-c\0something --num_processes 3\0", 1, True),  # not a launcher
    ],
)
def test_another_number_than_asked_stops(stated, command, world, fits, monkeypatch):
    monkeypatch.setattr(environment, "launcher_command", lambda: command)

    def check() -> None:
        sources = {"train.num_processes": stated}
        check_world(sources, world)

    if fits:
        check()
        return
    with pytest.raises(DistillError, match="processes were asked for") as caught:
        check()
    assert caught.value.code == Exit.TRAINING and "train.py" in str(caught.value)


def test_the_first_signal_is_noted_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
