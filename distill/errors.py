"""The one exception of the project, and the exit codes of its commands.

Every fault that a user can cause or meet ends as one line, `error: where: what (what to do)`, and one of these codes.
"""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the `distill` command; scripts may rely on them."""

    CONFIG = 2
    INPUT = 3
    TEACHER = 4
    STATE = 5
    BUDGET = 6
    TRAINING = 7
    EVALUATION = 8
    PUBLISH = 9
    TERMS = 10
    INTERRUPTED = 130


class DistillError(Exception):
    """Say where a fault is, what was found and what to do about it."""

    def __init__(self, code: Exit, where: object, what: str, fix: str) -> None:
        self.code, self.where, self.what, self.fix = code, str(where), what, fix
        super().__init__(f"{self.where}: {what} ({fix})")
