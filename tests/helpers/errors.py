"""How tests look at a UserError: by its code. What it says is asserted in one place, the test of that message."""

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
    """The block raises a UserError with this code, in one line; match: a pattern that is found in it."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    check(caught.value, code)


@contextmanager
def reported(code: str) -> Iterator[None]:
    """Within the block `main` turns a UserError with this code into the line that it prints."""
    seen: list[BaseException | None] = []

    def look(text: str) -> str:
        seen.append(sys.exception())
        return one_line(text)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli_main, "one_line", look)
        yield
    assert len(seen) == 1, "main reported no error, or several"
    check(seen[0], code)


def check(error: BaseException | None, code: str) -> None:
    assert isinstance(error, UserError)
    assert error.code == code, f"{error.code}: {error}"
    assert len(str(error).splitlines()) == 1, str(error)
