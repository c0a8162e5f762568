"""The errors a user can fix, and the exit codes of a command.

A managed job retries the transient code and no other, so the codes are part of the contract with the task YAMLs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_OK = 0
EXIT_MISSING = 1
"""`doctor` or `data check` found that something needed is missing or wrong."""
EXIT_USER_ERROR = 2
"""An invalid config, data set or argument: a retry would fail in the same way."""
EXIT_TRANSIENT = 75
"""Interrupted from outside (preemption, Ctrl-C): running it again continues the work. EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, and nothing was kept that another run could continue: 128 + SIGINT, as in a shell."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: where it is, what was expected, what to do.

    code: identifies the mistake, as `area.what`; it is stable across changes of wording and never shown. An error that only
    prefixes another one with its location keeps that one's code.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # otherwise the code would be lost when another process unpickles the error
        return _unpickled, (type(self), self.args), self.__dict__


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. The message says what was kept; resumable: whether the same command continues from there; code: the exit
    code if it does not."""

    def __init__(self, message: str, *, resumable: bool, code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.resumable, self.code = resumable, code


class NotEstimated(UserError):
    """The work or memory of a run cannot be estimated beforehand; the run may still be launched."""


def combined(errors: Sequence[UserError], where: str, *, code: str) -> UserError:
    """One error that lists all of them. code: used when their codes differ; otherwise their common code is kept."""
    kinds = {error.code for error in errors}
    return UserError(f"{where}: " + "; ".join(map(str, errors)), code=kinds.pop() if len(kinds) == 1 else code)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unpickled(kind: type[UserError], arguments: tuple[Any, ...]) -> UserError:
    return kind.__new__(kind, *arguments)
