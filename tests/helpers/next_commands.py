"""Whether a command that a stage prints can be typed: parsed by our own parser, or by SkyPilot's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from finetune.cli import main as cli
from finetune.stage_end.tell import Next


def typed(following: list[Next]) -> list[str]:
    """The commands as they are printed, each parsed by the program that it calls."""
    return [parsed(str(command)) for command in following]


def parsed(line: str) -> str:
    """The command in a line such as `finetune report runs/demo   (one page)`."""
    command = line.partition("   (")[0]
    typed_program, *words = shlex.split(command)
    program = Path(typed_program).name  # a path where the tests' PATH has none
    command = program + command.removeprefix(shlex.quote(typed_program))
    if program == "finetune":
        cli._parse(words)
    elif program == "sky":
        _sky(words)
    elif program == "make":
        targets = [words[0] + ":", *(word.partition("=")[0] + " ?=" for word in words[1:])]
        for text in targets:
            assert re.search(rf"^{re.escape(text)}", Path("Makefile").read_text(), re.MULTILINE), line
    else:
        assert (program, words[:2]) == ("gcloud", ["storage", "cp"]) and len(words) == 4, line
    return command


def _sky(words: list[str]) -> None:
    command = pytest.importorskip("sky.client.cli.command").cli
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words[0]]
        words = words[1:]
    assert not hasattr(command, "commands"), words
    command.make_context("sky", list(words), resilient_parsing=False)
