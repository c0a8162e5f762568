"""--json: one JSON document on stdout, and nothing else there."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_out: list[TextIO] = []


@contextmanager
def document_only(wanted: bool) -> Iterator[None]:
    """If wanted, whatever is printed within the block, also by libraries and by programs that are started, goes to stderr. Only
    `print_document` writes to stdout."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # not a file, as in a test
        own, sys.stdout = sys.stdout, sys.stderr
        _out.append(own)
        try:
            yield
        finally:
            _out.pop()
            sys.stdout = own
        return
    saved = os.dup(number)
    _out.append(os.fdopen(os.dup(saved), "w", encoding="utf-8"))
    os.dup2(sys.stderr.fileno(), number)
    try:
        yield
    finally:
        with suppress(OSError):  # a pipe whose reader has gone, which `print_document` has raised already
            _out.pop().close()
        sys.stdout.flush()
        os.dup2(saved, number)
        os.close(saved)


def print_document(value: Any) -> None:
    """Raises BrokenPipeError if the reader has gone. Numbers that JSON does not have become null, paths text."""
    out = _out[-1] if _out else sys.stdout
    out.write(json.dumps(plain(value), indent=2, allow_nan=False, default=str) + "\n")
    out.flush()


def plain(value: Any) -> Any:
    """The value without infinities and NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
