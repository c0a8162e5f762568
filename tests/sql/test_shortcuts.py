"""What is skipped to save time is skipped only where it would change nothing: each shortcut against the long way."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import answers, direct_sql
from finetune.data.answers import read_answer
from finetune.sql import lexer, parsing, text
from finetune.sql import volatility as clock
from finetune.sql.lexer import unclosed
from finetune.sql.parsing import parses
from finetune.sql.text import double_quotes_as_names, on_one_line, without_distinct
from finetune.sql.volatility import volatility

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PARTS = [
    "SELECT", "DISTINCT", "name", "a.b", '"x y"', "'it''s'", "'--'", "`q`", "[r]", "FROM t", ",", ", ", " , ", "( ", ")", " )",
    ";", "; ", "\n", "\n\n", "  ", "\t", "-- c\n", "/* d */", "/*", "'", '"', "date('now')", "date ('now')", "random()",
    "rand/**/()",
    "now ()", "current_date", "updated", "WHERE x = 1", "INTO u", "```", "```sql\n", "#", "### ", "~~~", "<s>", "<|x|>", "[SQL]",
    "The query is: ", "Question: ", "；", "&gt;", "UNION", "ORDER BY 1", "LIMIT 1", "é", "\u2028", "\x00",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts))
)


@cache
def corpus() -> tuple[str, ...]:
    """Gold queries and predictions of models."""
    if not SHARED.is_dir():
        pytest.skip("the shared data are not here")
    cases = [json.loads(line) for line in (SHARED / "evaluator_cases.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = json.loads((SHARED / "spider" / "dev.json").read_text(encoding="utf-8"))
    found = [case[key] for case in cases for key in ("gold", "pred")] + [item["query"] for item in dev]
    return tuple(dict.fromkeys([*found, *(f"```sql\n{sql};\n```\nDone." for sql in found[:200])]))


class Always:
    """Instead of a regular expression: a shortcut is never taken."""

    def search(self, *_: Any) -> bool:
        return True

    __call__ = search


def long_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(text, "_NOT_PLAIN", Always())
    patch.setattr(text, "_NOT_ON_ONE_LINE", Always())
    patch.setattr(lexer, "_OPENS", Always())
    patch.setattr(parsing, "_MAY_CHANGE", Always())
    patch.setattr(clock, "_may_be_volatile", Always())
    patch.setattr(direct_sql, "_MAY_END", Always())
    patch.setattr(answers, "is_all_sql", lambda _: False)
    patch.setattr(direct_sql, "_END_STARTS", AnyCharacter())
    patch.setattr(direct_sql, "_PARTIAL_STARTS", AnyCharacter())


class AnyCharacter:
    def __contains__(self, _: object) -> bool:
        return True


FUNCTIONS: list[Callable[[str], Any]] = [
    on_one_line, without_distinct, unclosed, parses, volatility, read_answer, double_quotes_as_names
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_shortcut_ends_where_the_long_way_does(function: Callable[[str], Any]) -> None:
    short = [function(sql) for sql in corpus()]
    with pytest.MonkeyPatch.context() as patch:
        long_way(patch)
        assert [function(sql) for sql in corpus()] == short


@given(TEXTS)
def test_a_shortcut_ends_where_the_long_way_does_on_any_text(sql: str) -> None:
    short = [function(sql) for function in FUNCTIONS]
    with pytest.MonkeyPatch.context() as patch:
        long_way(patch)
        assert [function(sql) for function in FUNCTIONS] == short


@pytest.mark.parametrize("gap", ["", " ", "\n", "/* x */", "-- x\n"])
def test_no_function_that_reads_the_clock_or_is_random_is_passed_over(gap: str) -> None:
    for name in clock._CLOCK_CALLS | clock._RANDOM_CALLS:
        assert volatility(f"SELECT {name.upper()}{gap}()"), name
    for name in clock._CLOCK_WORDS:
        assert volatility(f"SELECT {name}{gap} FROM t") == "clock", name
    for name in clock._DATE_CALLS:
        assert volatility(f"SELECT {name}{gap}('now')") == "clock", name
    for of, added in (
        ("calls", clock._CLOCK_CALLS_OF),
        ("words", clock._CLOCK_WORDS_OF),
        ("counted", clock._ARGUMENTS_OF),
    ):
        end = {"calls": "()", "words": "", "counted": "(x)"}[of]
        for dialect, names in added.items():
            for name in names:
                assert volatility(f"SELECT {name}{gap if end else ''}{end} FROM t", dialect) == "clock", name
