"""The errors a user can fix, and the exit codes of a command.

A managed job retries the transient code and no other, so the codes are part of the contract with the task YAMLs.
"""

from __future__ import annotations

import reprlib
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


LONGEST_MESSAGE = 500
"""Characters of an error's message: a longer one has echoed a value that is not worth reading."""
LONGEST_LIST = 10_000
"""Characters of a message that lists several things, such as all mistakes of a config or the machines nearest to a ceiling."""
MOST_LISTED = 25
LONGEST_VALUE = 80


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: where it is, what was expected, what to do.

    Characters that a terminal would act on become escapes, and what is longer than `longest` loses its middle. A list, such as
    that of the machines nearest to a ceiling, may have several lines.

    code: identifies the mistake, as `area.what`; it is stable across changes of wording and never shown. An error that only
    prefixes another one with its location keeps that one's code.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: str, *, code: str, longest: int = LONGEST_MESSAGE) -> None:
        super().__init__(shortened("\n".join(printable(line) for line in message.split("\n")), longest))
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


class TransientError(UserError):
    """Nothing is wrong with the config or the data: the same command later continues the work."""

    exit_code = EXIT_TRANSIENT


class TakenOver(UserError):
    """Another attempt has taken over the run of this one, which must not write to its folder any more."""


class NotEstimated(UserError):
    """The work or memory of a run cannot be estimated beforehand; the run may still be launched."""


def combined(errors: Sequence[UserError], where: str, *, code: str) -> UserError:
    """One error that lists all of them. code: used when their codes differ; otherwise their common code is kept."""
    kinds = {error.code for error in errors}
    lines = [str(error) for error in errors[:MOST_LISTED]]
    if more := len(errors) - len(lines):
        lines.append(f"and {more} more")
    same = kinds.pop() if len(kinds) == 1 else code
    return UserError(f"{shortened(where, LONGEST_MESSAGE)}: " + "; ".join(lines), code=same, longest=LONGEST_LIST)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """The text with its control characters, line ends and lone surrogates as escapes, so that it is one line and moves no
    terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, longest: int) -> str:
    """The text; without its middle if it has more characters than `longest`."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 3]} … {text[-end:]}"


def shown(value: object, longest: int = LONGEST_VALUE) -> str:
    """A value as messages show it: like repr, but short, however large or deeply nested the value is."""
    return shortened(_SHORT.repr(value), longest)


class _ShortRepr(reprlib.Repr):
    def repr_str(self, value: str, level: int) -> str:
        if len(value) <= LONGEST_VALUE:
            return repr(value)
        text = repr(value[: LONGEST_VALUE // 2])
        return f"{text[:-1]}…{text[-1]} ({len(value):,} characters)"

    def repr_int(self, value: int, level: int) -> str:  # Python refuses to write out thousands of digits
        return (
            repr(value)
            if value.bit_length() <= 128
            else f"a number of about {int(value.bit_length() * 0.30103):,} digits"
        )


_SHORT = _ShortRepr()
_SHORT.maxlevel = 3


def _unpickled(kind: type[UserError], arguments: tuple[Any, ...]) -> UserError:
    return kind.__new__(kind, *arguments)
