"""As many processes as asked, or none; and a first signal that lets the step finish."""

import os
import signal

import pytest

from distill.errors import DistillError, Exit
from distill.storage.processes import asked_of_launcher, check_world, interruptible

LAUNCH = "/usr/bin/python\0/usr/bin/accelerate\0launch\0--cpu\0--num_processes\0{}\0train.py\0"


def check(asked, command, world):
    sources = {"train.num_processes": asked, "launcher": asked_of_launcher(command)}
    check_world(sources, world, "scripts/train.py", Exit.TRAINING)


@pytest.mark.parametrize(
    ("asked", "command", "world"),
    [(2, "", 1), (1, "", 2), (None, LAUNCH.format(2), 1), (None, LAUNCH.format(1), 2)],
)
def test_another_number_than_asked_stops(asked, command, world):
    with pytest.raises(DistillError, match="processes were asked for") as fault:
        check(asked, command, world)
    assert fault.value.code == Exit.TRAINING and "train.py" in str(fault.value)


@pytest.mark.parametrize(
    ("asked", "command", "world"),
    [
        (None, "", 1),
        (2, LAUNCH.format(2), 2),
        (None, "torchrun\0--nproc-per-node=4\0train.py\0", 4),
        (None, "bash\0-c\0something --num_processes 3\0", 1),  # not a launcher
    ],
)
def test_the_number_asked_passes(asked, command, world):
    check(asked, command, world)


def test_the_first_signal_is_noted_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
