"""A second SQL engine takes one module and one registry entry: data, evaluation and `generate` then run its dialect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceSection
from finetune.data.prepared import load_prepared
from finetune.data.sources import open_source
from finetune.data.validate import DATABASE_MISSING, DATABASE_UNREADABLE, GOLD_FAILS, validate
from finetune.evaluation.ask import formatted, rows_of, schema_of
from finetune.evaluation.judge import score_answer
from finetune.sql.engines.registry import ENGINES, engine_for, engine_of_file, open_sessions
from finetune.sql.engines.sqlite import SqliteEngine
from tests.helpers.data_examples import jsonl_source, make_database, row, run_prepare, write_jsonl
from tests.helpers.json_engine import JsonEngine, JsonSession

ITEMS = [{"id": number, "name": f"item {number}", "price": number * 1.5} for number in range(3)]


@pytest.fixture
def json_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "duckdb", JsonEngine())


def make_json_database(folder: Path, db_id: str = "shop") -> Path:
    path = folder / db_id / f"{db_id}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"item": ITEMS}))
    return path


def spider_folder(folder: Path, *rows: dict[str, str]) -> SourceSection:
    (folder / "database").mkdir(parents=True)
    (folder / "dev.json").write_text(json.dumps(rows))
    return SourceSection(kind="spider", path=str(folder), files=["dev.json"], dialect="duckdb")


def checked(section: SourceSection) -> tuple[list[Any], list[str]]:
    accepted, rejections = validate(open_source(section, "source", progress=False), timeout_seconds=5, progress=False)
    return accepted, [rejection.reason for rejection in rejections]


@pytest.mark.usefixtures("json_engine")
def test_its_records_are_validated_with_schemas_and_gold_of_its_databases(tmp_path: Path) -> None:
    section = spider_folder(
        tmp_path,
        {"db_id": "shop", "question": "Names?", "query": "SELECT name FROM item"},
        {"db_id": "shop", "question": "Titles?", "query": "SELECT title FROM item"},
        {"db_id": "depot", "question": "Names?", "query": "SELECT name FROM item"},
        {"db_id": "torn", "question": "Names?", "query": "SELECT name FROM item"},
    )
    database = make_json_database(tmp_path / "database")
    make_json_database(tmp_path / "database", "torn").write_text("{")
    [accepted], reasons = checked(section)
    assert reasons == [GOLD_FAILS, DATABASE_MISSING, DATABASE_UNREADABLE]
    assert accepted.database == database
    assert accepted.record.schema == "CREATE TABLE item (id INTEGER, name VARCHAR, price DOUBLE);"


def prepared(folder: Path) -> Any:
    """Half of the records are for SQLite, half for the toy engine, each half with its own database."""
    make_database(folder / "databases")
    make_json_database(folder / "databases", "stall")
    rows = [row(number, split=split) for number, split in enumerate(["train", "test"])]
    rows += [row(2, db_id="stall", dialect="duckdb", split="test", question="What?")]
    source = jsonl_source(write_jsonl(folder / "records.jsonl", rows), databases=str(folder / "databases"))
    run_prepare([source], folder / "prepared", val_fraction=0)
    return load_prepared(folder / "prepared", progress=False)


@pytest.mark.usefixtures("json_engine")
def test_each_prediction_is_run_by_the_engine_of_its_dialect(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    (of_sqlite, of_toy) = sorted(data.records("test"), key=lambda record: record.db_id)
    files = [str(data.database(record).relative_to(data.folder)) for record in (of_sqlite, of_toy)]
    assert files == ["databases/shop/shop.sqlite", "databases/stall/stall.json"]
    asked = [
        (of_sqlite, "SELECT 'item 1'", "correct"),
        (of_toy, "SELECT name FROM item WHERE price > 2", "correct"),
        (of_toy, "SELECT name FROM item", "wrong_rows"),
        (of_toy, "SELECT title FROM item", "sql_error"),
    ]
    with open_sessions() as session:
        for record, answer, verdict in asked:
            judged = score_answer(
                record, data.database(record), "prompt", answer, 3,
                sandbox=session(record.dialect), rule="strict", timeout_seconds=5,
            )  # fmt: skip
            assert judged.verdict == verdict, (answer, judged.error)
        assert isinstance(session("duckdb"), JsonSession) and session("duckdb") is session("duckdb")


@pytest.mark.usefixtures("json_engine")
def test_a_database_file_finds_its_engine_by_its_suffix(tmp_path: Path) -> None:
    database = make_json_database(tmp_path)
    assert schema_of(database).startswith("CREATE TABLE item (id INTEGER, name VARCHAR")
    found = rows_of(database, "SELECT name FROM item WHERE id = 2", 5)
    assert formatted(found.columns, found.rows).splitlines()[2:] == ["item 2", "(1 row)"]
    for name in ("shop.sqlite", "shop.db", "shop"):
        assert isinstance(engine_of_file(tmp_path / name), SqliteEngine)


def test_a_dialect_without_an_engine_is_parsed_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ENGINES, "duckdb", raising=False)
    make_json_database(tmp_path / "databases")
    rows = [row(1, dialect="duckdb", sql="SELECT name FROM item"), row(2, dialect="duckdb", sql="SELECT FROM WHERE")]
    source = jsonl_source(write_jsonl(tmp_path / "rows.jsonl", rows), databases=str(tmp_path / "databases"))
    [accepted], reasons = checked(source)
    assert accepted.database is None and reasons == ["sql_does_not_parse"]
    assert engine_for("duckdb") is None
