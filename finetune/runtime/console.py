"""Console output that survives terminals with a limited encoding and closed pipes.

A terminal may lack the characters of a question or a file name; they are then printed as escapes. And a run must not end because
the reader of its log has ended. When a machine shuts down, all its processes get SIGTERM at once, including the one that reads
the output of training; the next print would then raise BrokenPipeError, between the notice and the checkpoint.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from finetune.errors import printable
from finetune.runtime import distributed


def escape_unprintable() -> None:
    """Make stdout and stderr print characters that they cannot encode as \\xfc or \\u2192, not raise UnicodeEncodeError.

    That includes lone surrogates, which stand for undecodable bytes of a file name and which UTF-8 cannot encode. An error
    handler set by PYTHONIOENCODING is kept.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def typed_text(text: str) -> str:
    """A command-line argument that is text, not a file name: bytes that the locale cannot decode are decoded as UTF-8.

    Raises UnicodeDecodeError if they are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""C0 and C1 control characters but tab and line feed, and what changes the direction of text or breaks lines unseen."""


def visible(text: str, *, one_line: bool = False) -> str:
    """The text with control characters as escapes, such as \\x1b and \\u202e: text from databases, models and data sets could
    otherwise move the cursor, colour or hide other text, or set a terminal's title. one_line: tabs and line feeds, too. The line
    ends of Windows are line feeds; a carriage return elsewhere would write over its line, and is an escape."""
    text = text.replace("\r\n", "\n")
    if one_line:
        text = text.replace("\n", "\\n").replace("\t", "\\t")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(message: str) -> str:
    """An error's message in one line, without control characters.

    If it contains characters that this locale cannot encode, a file may have been missed because of that, so the message says so.
    """
    message = printable(" ".join(message.splitlines()))
    try:
        os.fsencode(message)
    except UnicodeEncodeError:
        return f"{message} ({_encoding_advice()})"
    return message


def not_encoded(error: UnicodeEncodeError) -> str:
    """The message for this error. Printing never raises it, so it is about a file name: one that the locale cannot encode, or
    one that is not valid text."""
    utf_8 = sys.getfilesystemencoding().lower() == "utf-8"
    return f"{error.object!a}: {'not text in UTF-8; give it another name' if utf_8 else _encoding_advice()}"


def _encoding_advice() -> str:
    return (
        f"this locale's encoding, {sys.getfilesystemencoding().lower()}, has no such characters: set PYTHONUTF8=1, or a UTF-8 "
        "locale such as LC_ALL=C.UTF-8"
    )


class _BrokenPipeSafeStream:
    """A text stream that discards its output once the reader has closed the pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._ignoring_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignoring_errors():
            self._stream.flush()

    @contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._to_devnull()
        except OSError:  # a log on a full disk, a closed terminal: the next write may succeed again
            pass

    def _to_devnull(self) -> None:
        """Redirects the file descriptor, so also buffered text and the output of C code and child processes."""
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def broken_pipe_safe() -> Iterator[None]:
    """While the block runs, printing to stdout or stderr does not raise OSError, such as BrokenPipeError."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _BrokenPipeSafeStream(sys.stdout), _BrokenPipeSafeStream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


def say(message: str) -> None:
    if distributed.is_rank0():
        tqdm.write(visible(message), file=sys.stderr)  # on a line of its own, also while a bar is shown
