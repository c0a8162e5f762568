"""From rows to records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.init.columns import map_columns
from finetune.init.database import Database, look_at_database
from finetune.init.pairs import Pairs, records_of
from finetune.init.rows import Rows
from tests.helpers.errors import raises
from tests.init.conftest import make_library

Write = Callable[..., Path]
SQL, QUESTION = "SELECT title FROM book", "Which books are there?"


def pairs(rows: list[dict[str, Any]], database: Database | None = None) -> Pairs:
    table = Rows(Path("pairs.csv"), list(rows[0]), rows, [f"pairs.csv:{n}" for n in range(2, 2 + len(rows))])
    return records_of(table, map_columns(table, None).columns, database, "sqlite")


def test_rows_of_a_form_that_are_not_filled_in_are_left_out(library: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": QUESTION, "sql": f" {SQL} "},
        {"question": QUESTION, "sql": ""},
        {"question": None, "sql": SQL},
    ]
    found = pairs(rows, look_at_database(library))
    [record] = found.records
    assert (record.id, record.db_id, record.sql, found.unfilled) == ("pairs-1", "library", SQL, ["3", "4"])
    assert record.schema.startswith("CREATE TABLE author")
    with raises("init.nothing_filled_in"):
        pairs([{"question": QUESTION, "sql": ""}, {"question": "", "sql": SQL}], look_at_database(library))


def test_ids_are_kept_where_they_are_unique(library: Path) -> None:
    database = look_at_database(library)
    rows = [{"id": number, "question": QUESTION, "sql": SQL} for number in (3.0, 4.0)]
    assert [record.id for record in pairs(rows, database).records] == ["3", "4"]
    rows = [{"id": 3, "question": QUESTION, "sql": SQL} for _ in range(2)]
    assert [record.id for record in pairs(rows, database).records] == ["pairs-1", "pairs-2"]


@pytest.mark.parametrize(
    ("given", "splits", "note"),
    [
        (("train", "test"), [None, "test"], "no rows of val: taken from those of train"),
        (("train", "dev"), [None, "val"], "no rows of test: taken from those of train"),
        (("train", "train"), [None, None], "no rows of val and test: taken from those of train"),
        (("test", "dev"), ["test", "val"], None),
        (("train", "test", ""), ["train", "test", None], None),
        (("train", "test", "dev"), ["train", "test", "val"], None),
    ],
)
def test_a_split_that_no_row_is_of_is_taken_from_train(
    library: Path, given: tuple[str, ...], splits: list[str | None], note: str | None
) -> None:
    rows = [{"question": QUESTION, "sql": SQL, "split": split} for split in given]
    found = pairs(rows, look_at_database(library))
    assert [record.split for record in found.records] == splits
    assert found.notes == ((f"the column 'split' has {note}",) if note else ())


def test_splits_under_their_many_names(library: Path) -> None:
    rows = [{"question": QUESTION, "sql": SQL, "split": split} for split in ("training", "dev", "TEST", "")]
    assert [record.split for record in pairs(rows, look_at_database(library)).records] == ["train", "val", "test", None]


def test_each_row_may_bring_its_schema() -> None:
    schema = "CREATE TABLE book (title TEXT)"
    [record] = pairs([{"question": QUESTION, "sql": SQL, "context": schema}]).records
    assert record.schema == schema and record.db_id.startswith("schema-")
    with raises("init.no_schema", match="--db"):
        pairs([{"question": QUESTION, "sql": SQL}])


def test_each_row_may_name_its_database(tmp_path: Path) -> None:
    make_library(tmp_path / "all" / "one" / "one.sqlite")
    database = look_at_database(tmp_path / "all")
    [record] = pairs([{"question": QUESTION, "sql": SQL, "db_id": "one"}], database).records
    assert record.db_id == "one" and record.schema == database.schemas["one"]
    with raises("init.unknown_database", match="two/two.sqlite"):
        pairs([{"question": QUESTION, "sql": SQL, "db_id": "two"}], database)


def test_a_row_that_is_no_record_is_named(library: Path) -> None:
    with raises("init.bad_row", match=r"pairs.csv:3: .*surrogate"):
        pairs(
            [{"question": QUESTION, "sql": SQL}, {"question": "What\ud800 now?", "sql": SQL}], look_at_database(library)
        )
