"""Assertions on a UserError by its code. The wording of a message is asserted only in the test of that message."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.cli import main as cli_main
from finetune.errors import UserError
from finetune.runtime.console import one_line


@contextmanager
def raises(
    code: str, *, match: str | None = None, kind: type[UserError] = UserError
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises a one-line UserError with this code. match: a regular expression that its message must contain."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    check(caught.value, code)


@contextmanager
def reported(code: str) -> Iterator[None]:
    """Within the block, `main` reports exactly one UserError, and it has this code."""
    seen: list[BaseException | None] = []

    def record(text: str) -> str:
        seen.append(sys.exception())
        return one_line(text)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli_main, "one_line", record)
        yield
    assert len(seen) == 1, "main reported no error, or several"
    check(seen[0], code)


def check(error: BaseException | None, code: str) -> None:
    assert isinstance(error, UserError)
    assert error.code == code, f"{error.code}: {error}"
    assert len(str(error).splitlines()) == 1, str(error)
