"""The questions of `finetune init`: three at most, and none with --yes or where nobody can answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune.runtime.console import say

MOST = 3


@dataclass
class Asker:
    """answers: whether there is somebody who answers. read: a line from that person."""

    answers: bool
    read: Callable[[str], str] = field(default=input)
    asked: int = 0

    def __call__(self, question: str, default: str = "", choices: tuple[str, ...] = ()) -> str:
        """The answer; the default for an empty one, after three questions, or where nobody answers."""
        if not self.answers or self.asked == MOST:
            return default
        self.asked += 1
        wanted = f" [{'/'.join(choices)}]" if choices else ""
        for _ in range(3):
            try:
                answer = self.read(f"{question}{wanted}{f' ({default})' if default else ''}: ").strip()
            except EOFError:
                return default
            if not answer or not choices or answer in choices:
                return answer or default
            say(f"expected {' or '.join(choices)}")
        return default


def asker(*, yes: bool) -> Asker:
    return Asker(not yes and sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty(), _read)


def _read(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for results
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
