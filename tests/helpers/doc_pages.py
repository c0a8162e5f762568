"""Pages of the documentation as tests read them: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
SHELL = ("bash", "sh", "")
BLOCK = re.compile(
    r"(?:<!-- not run in tests: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
OPERATORS = ("&&", "||", ";", "|", "&")
OTHER_PROGRAMS = (
    "gcloud",
    "mkdir",
    "ssh",
    "source",
    "curl",
    "kill",
    "wait",
    "tensorboard",
    "jq",
    "git",
    "pip",
    "cd",
    "eval",
    "sqlite3",
    "cat",
    "cp",
)
"""Programs of others, whose words nobody here can parse."""


@dataclass(frozen=True)
class Block:
    """A fenced block. line: where it begins. not_run: the reason why no test runs it, None for one that is run."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], text.count("\n", 0, found.start("text")), found["reason"])
        for found in BLOCK.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell block; comments, operators, redirections, assignments and variables are left out."""
    text = re.sub(r"<<'(\w+)'(.*?)\n\1$", r"", text, flags=re.M | re.S)  # here-documents
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in OPERATORS:
                if words:
                    yield words
                words = []
            elif not (word.startswith("$") or (re.fullmatch(r"[A-Z_]+=.*", word) and not words)):
                words.append(word)
        if words:
            yield words[: words.index(">")] if ">" in words else words


def parse(words: list[str]) -> None:
    """Let the program that a command calls parse it; fails where that refuses it."""
    program, *rest = words
    if program == "finetune":
        cli._parse(rest)
    elif program == "sky":
        parse_sky(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program.startswith("python"):
        assert find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file(), words
    else:
        assert program.startswith((".venv/bin/", ".ci/")) or program in OTHER_PROGRAMS, words


def parse_sky(words: list[str]) -> None:
    command = pytest.importorskip("sky.client.cli.command").cli
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands"), words
    command.make_context("sky", list(words), resilient_parsing=False)
    for word in words:
        assert not word.endswith(".yaml") or (ROOT / word).is_file(), word
