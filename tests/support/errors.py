"""Errors that a block must end with."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distill.errors import DistillError, Exit


@contextmanager
def stops(code: Exit, match: str | None = None) -> Iterator[pytest.ExceptionInfo[DistillError]]:
    """Hold that the block ends with a DistillError of this code, whose line matches `match`."""
    with pytest.raises(DistillError, match=match) as stopped:
        yield stopped
    assert stopped.value.code == code
