"""Codes of UserError: every place that raises one names it, and every code is asserted by a test."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from finetune.cli.main import main
from finetune.config.schema import RunConfig
from finetune.errors import LONGEST_LIST, LONGEST_MESSAGE, NotEstimated, UserError, combined, shown
from finetune.estimate.fit import MicroBatchConfig, TooSmall
from finetune.runtime.console import one_line
from tests.helpers.errors import raises, reported

ROOT = Path(__file__).resolve().parents[1]
MAKERS = ("UserError", "NotEstimated", "TakenOver", "TooSmall", "TransientError", "combined")
CODE = re.compile(r"[a-z]+(_[a-z]+)*\.[a-z]+(_[a-z]+)*")
PASSED_ON = ("error.code", "self._fault.code", "known['user_code']")
"""Codes of errors that are re-raised with a prefix."""
NOT_ASSERTED: dict[str, str] = {}
"""Codes that no test asserts -> why not."""


def trees(*folders: str) -> dict[str, ast.Module]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def calls() -> dict[str, ast.expr | None]:
    """Where a UserError is created -> the expression of its code."""
    return {
        f"{path}:{node.lineno}": next((keyword.value for keyword in node.keywords if keyword.arg == "code"), None)
        for path, tree in trees("finetune", "chaos", "benchmarks").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MAKERS
        if path != "finetune/errors.py"
    }


def codes() -> set[str]:
    return {str(code.value) for code in calls().values() if isinstance(code, ast.Constant)}


def test_every_error_names_its_code() -> None:
    wrong = {
        place: code and ast.unparse(code)
        for place, code in calls().items()
        if not (isinstance(code, ast.Constant) and CODE.fullmatch(str(code.value)))
        and (code is None or ast.unparse(code) not in PASSED_ON)
    }
    assert wrong == {}
    assert len(calls()) > 200


def test_every_subclass_of_user_error_is_searched() -> None:
    derived = {
        node.name
        for tree in trees("finetune", "chaos", "benchmarks").values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & {*MAKERS}
    }
    assert {"UserError", *derived, "combined"} == {*MAKERS}


def test_every_code_is_asserted_by_a_test() -> None:
    asserted = {
        node.value
        for path, tree in trees("tests").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path != "tests/test_errors.py"
    }
    assert codes() - asserted == NOT_ASSERTED.keys()


def test_no_code_is_also_a_key_of_the_config() -> None:
    sections = get_type_hints(RunConfig)
    assert not codes() & {f"{name}.{key.name}" for name, section in sections.items() for key in fields(section)}


# the class


@pytest.mark.parametrize(
    "error",
    [
        UserError("its line", code="some.mistake"),
        NotEstimated("its line", code="some.mistake"),
        TooSmall("its line", MicroBatchConfig(1, 2, 3), code="some.mistake"),
    ],
)
def test_an_error_survives_pickling(error: UserError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), vars(again)) == ("its line", vars(error))
    assert str(error) == "its line" and error.code == "some.mistake"


def test_combined_errors_keep_a_common_code() -> None:
    first, second, other = (UserError(text, code=f"some.{kind}") for text, kind in [("1", "a"), ("2", "a"), ("3", "b")])
    alike, mixed = combined([first, second], "here", code="some.c"), combined([first, other], "here", code="some.c")
    assert (str(alike), alike.code) == ("here: 1; 2", "some.a")
    assert (str(mixed), mixed.code) == ("here: 1; 3", "some.c")


# the helper of the tests


def test_a_message_is_one_short_line_that_moves_no_cursor() -> None:
    error = UserError("a\nb\x1b[2J\x07\r\u2028\ud800ü", code="some.code")
    assert str(error) == "a\n" + r"b\x1b[2J\x07\r\u2028\ud800ü", "a list keeps its lines; the command line joins them"
    assert one_line(str(error)) == r"a b\x1b[2J\x07\r\u2028\ud800ü"
    long = str(UserError(f"file: {'x' * 5000}; do this", code="some.code"))
    assert len(long) == LONGEST_MESSAGE and long.startswith("file: xx") and long.endswith("x; do this")
    many = str(combined([UserError("y" * 900, code="some.a")] * 400, "z" * 900, code="some.b"))
    assert len(many) <= LONGEST_LIST + 500 and many.endswith("; and 375 more")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b", r"'a\x1b'"),
        ("x" * 5000, f"'{'x' * 40}…' (5,000 characters)"),
        (10**5000, "a number of about 5,000 digits"),
        (2**32, "4294967296"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        (None, "None"),
    ],
    ids=["control", "long", "huge", "number", "nested", "none"],
)
def test_a_value_is_shown_shortly(value: object, text: str) -> None:
    assert shown(value, 200) == text
    assert len(shown([value] * 1000)) <= 80


@pytest.mark.parametrize("error", [UserError("x", code="other.code"), OSError("x")])
def test_another_code_fails_the_assertion(error: Exception) -> None:
    with pytest.raises((AssertionError, OSError)), raises("some.code"):
        raise error


def test_what_main_reports_has_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reported("config.not_found"):
        assert main(["config", str(tmp_path / "absent.yaml")]) == 2
    with pytest.raises(AssertionError), reported("config.unknown_key"):
        main(["config", str(tmp_path / "absent.yaml")])
    with pytest.raises(AssertionError), reported("config.not_found"):
        pass
    assert capsys.readouterr().err.count("no such config file") == 2
