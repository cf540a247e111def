"""The sandbox: right programs pass, wrong ones fail with a reason, and none runs unasked."""

import pytest

from distill.errors import DistillError
from distill.sandbox.run import DEFAULT, Trial, execute, run_tests, unavailable

walled = pytest.mark.skipif(bool(unavailable()), reason=f"no sandbox here: {unavailable()}")


def test_nothing_runs_unasked() -> None:
    with pytest.raises(DistillError, match="--allow-code"):
        run_tests("def f(x):\n    return x", Trial("assert f(1) == 1"))


@walled
def test_a_right_program_passes() -> None:
    assert execute("def f(x):\n    return x", Trial("assert f(1) == 1"), DEFAULT, True).passed
