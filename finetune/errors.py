"""The two ways in which a command ends badly on purpose, and the exit codes that tell them apart.

A managed job retries the transient code and nothing else, so the codes are part of the contract with the task YAMLs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_OK = 0
EXIT_MISSING = 1
"""`doctor` or `data check` found something that is needed and absent or wrong."""
EXIT_USER_ERROR = 2
"""A broken config, data set or argument: running it again changes nothing."""
EXIT_TRANSIENT = 75
"""Stopped by the machine, not by the work (preemption, Ctrl-C): running it again goes on. EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: where it is, what was expected, what to do.

    code: which mistake it is, as `area.what`; it stays the same when the wording changes, and is never shown. An error that
    passes another one on with its place in front keeps that one's code.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # else the code would be missing where another process unpickles it
        return _unpickled, (type(self), self.args), self.__dict__


class NotEstimated(UserError):
    """A run whose work or memory cannot be estimated beforehand; it may be launched all the same."""


def all_in_one(errors: Sequence[UserError], where: str, *, code: str) -> UserError:
    """One error that lists them all. code: of mistakes of several kinds; where all are of one kind, theirs is kept."""
    kinds = {error.code for error in errors}
    return UserError(f"{where}: " + "; ".join(map(str, errors)), code=kinds.pop() if len(kinds) == 1 else code)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unpickled(kind: type[UserError], arguments: tuple[Any, ...]) -> UserError:
    return kind.__new__(kind, *arguments)
