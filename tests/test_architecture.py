"""docs/architecture.md tells where things are: every file and name in its table is there, and no answer needs three files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = "## Where is ..."


def answers() -> list[tuple[str, list[tuple[str, str]]]]:
    """(question, [(file, name in it or "")]) of every row."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1:-1] for line in text.partition(SECTION)[2].partition("\n## ")[0].splitlines() if "|" in line
    ]
    return [
        (question.strip(), [(path, name or "") for path, name in re.findall(r"`([^`:]+)(?:: ([^`]+))?`", answer)])
        for question, answer in rows[2:]
    ]


def names(node: ast.AST, prefix: str = "") -> set[str]:
    """Functions, classes, methods and assigned names below a node, with dots."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            found.add(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                found |= names(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign):
            found |= {prefix + target.id for target in child.targets if isinstance(target, ast.Name)}
    return found


def test_twenty_questions_are_answered() -> None:
    assert len(answers()) >= 20
    assert len({question for question, _ in answers()}) == len(answers())


@pytest.mark.parametrize(("question", "places"), answers(), ids=[question for question, _ in answers()])
def test_what_an_answer_names_is_there(question: str, places: list[tuple[str, str]]) -> None:
    assert question.endswith("?") and places
    assert len({path for path, _ in places}) <= 2, "an answer is found in two files at most"
    for path, name in places:
        assert (ROOT / path).is_file(), path
        assert not name or name in names(ast.parse((ROOT / path).read_text(encoding="utf-8"))), f"{path} has no {name}"
