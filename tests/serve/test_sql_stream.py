"""What of an answer's SQL is sent while it grows: always a beginning of the SQL of the whole answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.data.answers import extract_sql
from finetune.serve.sql_stream import SqlStream
from tests.data.test_answers import CASES

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "evaluator_cases.jsonl"


def parts(answer: str, dialect: str = "sqlite", step: int = 1) -> tuple[list[str], str | None]:
    """What is sent while the answer grows, and at its end; None if that is not the SQL."""
    stream = SqlStream(dialect)
    sent = [part for end in range(step, len(answer), step) if (part := stream.feed(answer[:end]))]
    return sent, stream.rest(extract_sql(answer, dialect))


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        ("SELECT name FROM item", ["SELECT", " name", " FROM"]),
        ("SELECT  name,price FROM item ;", ["SELECT", " name", ", price", " FROM", " item"]),
        (
            "\nSELECT a.b FROM t WHERE x >= 1.5;\nmore",
            ["SELECT", " a", ".b", " FROM", " t", " WHERE", " x", " >", "=", " 1", ".5"],
        ),
        ("SELECT 'it''s; -- x' FROM t\n", ["SELECT", " 'it''s; -- x'", " FROM"]),
        ('SELECT "a b" FROM t x', ["SELECT", ' "a b"', " FROM", " t"]),
        ("SELECT COUNT(*) FROM t", ["SELECT", " COUNT", "(*)", " FROM"]),
        ("SELECT x - 1 FROM t", ["SELECT", " x", " -", " 1", " FROM"]),
        ("SELECT a -- b\nFROM t", ["SELECT", " a"]),
        ("SELECT a\nFROM t", ["SELECT", " a"]),
        ("Here it is: SELECT 1", []),
        ("```sql\nSELECT 1\n```", []),
        ("UPDATE t SET a = 1", []),
    ],
)
def test_what_is_certain_is_sent(answer: str, sent: list[str]) -> None:
    found, rest = parts(answer)
    assert "".join(found) == "".join(sent) and rest is not None
    assert "".join(found) + rest == extract_sql(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT a FROM t. This query returns a.",
        "SELECT a FROM t</s>",
        "SELECT a FROM t<|im_end|>",
        "SELECT a FROM t [/INST] more",
        "SELECT a FROM t``` and so on",
        "SELECT a FROM t WHERE b &lt; 3",
        "SELECT a FROM t */ more",
        "SELECT a FROM t|",
        "WITH x AS (SELECT 1) SELECT * FROM x\n\nThis works.",
    ],
)
def test_what_may_follow_sql_is_held_back(answer: str) -> None:
    found, rest = parts(answer)
    assert rest is not None, f"{''.join(found)!r} was sent, and the SQL is {extract_sql(answer)!r}"


@pytest.mark.parametrize("dialect", ["postgres", "mysql", "tsql", "bigquery", "snowflake"])
def test_other_dialects(dialect: str) -> None:
    for answer in ("SELECT a FROM t WHERE b = 'x'", "SELECT  a ,b FROM t", "SELECT a FROM t WHERE b = 'x\\' OR 1 --'"):
        found, rest = parts(answer, dialect)
        assert rest is not None and "".join(found) + rest == extract_sql(answer, dialect)


def test_the_answers_of_the_readers_own_tests() -> None:
    changed = [answer for answer, _ in CASES if parts(answer)[1] is None]
    assert len(CASES) > 50 and len(changed) <= len(CASES) // 20, changed


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared")
def test_published_predictions() -> None:
    """Of 800, one is no SQL as a whole and changes; of the others most is sent before the end."""
    answers = [json.loads(line)["pred"] for line in SHARED.read_text(encoding="utf-8").splitlines()]
    early = total = changed = 0
    for answer in answers:
        found, rest = parts(answer, step=3)
        changed += rest is None
        early, total = early + len("".join(found)), total + len(extract_sql(answer))
    assert len(answers) == 800 and changed <= 1 and early > 0.8 * total
