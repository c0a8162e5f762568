"""Prints that reach the terminal that there is, and that outlive their reader.

A terminal may lack the characters of a question or a file name: then they are shown as escapes. And the end of a log's reader
must not be the end of a run. When a machine shuts down, every process of it gets SIGTERM at once, also the one that reads what
training prints; the next line would then raise BrokenPipeError, between the notice and the checkpoint.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from finetune.runtime import distributed


def print_anything() -> None:
    """From now on stdout and stderr show what their encoding lacks as \\xfc or \\u2192 instead of raising UnicodeEncodeError.

    Half a surrogate pair, as Python writes bytes of a file name that are no text, is no character of UTF-8 either. What
    PYTHONIOENCODING asks for such characters stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def typed_text(text: str) -> str:
    """What was meant by an argument that is text, not a file name: bytes beyond the locale's encoding are read as UTF-8.

    Raises UnicodeDecodeError where they are none.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


def one_line(message: str) -> str:
    """An error's message; where it may have named a file that is there under a name which this locale cannot spell, that too."""
    message = " ".join(message.splitlines())
    try:
        os.fsencode(message)
    except UnicodeEncodeError:
        return f"{message} ({_unspelt()})"
    return message


def not_encoded(error: UnicodeEncodeError) -> str:
    """What to say of it. Printing never raises it: it is a file name that the locale cannot spell, or one that is no text."""
    utf_8 = sys.getfilesystemencoding().lower() == "utf-8"
    return f"{error.object!a}: {'not text in UTF-8; give it another name' if utf_8 else _unspelt()}"


def _unspelt() -> str:
    return (
        f"this locale's encoding, {sys.getfilesystemencoding().lower()}, has no such characters: set PYTHONUTF8=1, or a UTF-8 "
        "locale such as LC_ALL=C.UTF-8"
    )


class _Heard:
    """A text stream that is written to as long as somebody reads it, and then to nobody."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._to_devnull()
        except OSError:  # a log on a full disk, a terminal that was closed: the next line may go through again
            pass

    def _to_devnull(self) -> None:
        """What is still buffered, what C code writes and what child processes print goes there, too."""
        with suppress(OSError, ValueError):
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, self._stream.fileno())
            os.close(nobody)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def broken_pipe_safe() -> Iterator[None]:
    """While the block runs, no print to stdout or stderr raises because nobody can take it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Heard(sys.stdout), _Heard(sys.stderr)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


def say(message: str) -> None:
    if distributed.is_rank0():
        tqdm.write(message, file=sys.stderr)  # on a line of its own, also while a bar is shown
