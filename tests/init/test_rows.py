"""Reading what people call a table, and refusing in one line what is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.init.rows import read_rows
from tests.helpers.errors import raises
from tests.init.conftest import as_csv, questions

Write = Callable[..., Path]
HEADER = ["question", "sql"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_usual_separator_is_found(file: Write, delimiter: str) -> None:
    pairs = [
        (f"How many, of {n}; and why, |really|?", f"SELECT count(*), 1 FROM book WHERE id = {n}") for n in range(5)
    ]
    table = read_rows(file("pairs.csv", as_csv(pairs, delimiter=delimiter)))
    assert table.columns == HEADER
    assert [tuple(row.values()) for row in table.rows] == pairs
    assert bool(table.notes) == (delimiter != ",")


def test_quotes_may_hold_line_breaks_and_the_places_stay_right(file: Write) -> None:
    table = read_rows(file("pairs.csv", 'question,sql\n"two\nlines","SELECT ""a""\nFROM t"\n\nq,SELECT 1\n'))
    assert table.rows == [{"question": "two\nlines", "sql": 'SELECT "a"\nFROM t'}, {"question": "q", "sql": "SELECT 1"}]
    assert [place.rpartition(":")[2] for place in table.places] == ["2", "6"]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("windows-1252", True)],
)
def test_encodings_are_read_and_a_guess_is_said(file: Write, encoding: str, said: bool) -> None:
    text = "question,sql\nWo ist Köln?,SELECT 1 FROM t\nUnd Bonn?,SELECT 2 FROM t\n"
    table = read_rows(file("pairs.csv", text.encode(encoding)))
    assert table.columns == HEADER and table.rows[0]["question"] == "Wo ist Köln?"
    assert ["'Köln'" in note and "--encoding" in note for note in table.notes] == [True] * said


def test_an_encoding_that_is_named_is_used(file: Write) -> None:
    path = file("pairs.csv", "question,sql\nГде?,SELECT 1\n".encode("koi8-r"))
    assert read_rows(path, "koi8-r").rows[0]["question"] == "Где?"
    with raises("init.bad_encoding", match="line|pairs.csv:2"):
        read_rows(path, "ascii")
    with raises("init.bad_encoding", match="no-such"):
        read_rows(path, "no-such")
    with raises("init.bad_encoding", match="neither UTF-8"):
        read_rows(file("other.csv", b"question,sql\n\x81\x8d?,SELECT 1\n"))


@pytest.mark.parametrize(
    ("content", "code", "why"),
    [
        (b"", "init.empty_data", "empty"),
        (b" \n\n", "init.empty_data", "empty"),
        (b"question,sql\n", "init.empty_data", "no rows"),
        (b"\x00\x01\x02\x00", "init.not_a_table", "binary"),
        (b"PK\x03\x04rest", "init.not_a_table", "Excel"),
        (b"\x1f\x8b\x08", "init.not_a_table", "compressed"),
        (b"SQLite format 3\x00", "init.not_a_table", "--db"),
        (b"PGDMP\x01", "init.not_a_table", "pg_restore"),
        (b"PAR1 no parquet", "init.not_a_table", "parquet"),
        (b"question\nHow many?\n", "init.one_column", "one column"),
        (b"sql,question,sql\na,b,c\n", "init.repeated_column", "twice"),
        (b"question,sql\nHow many, really?,SELECT 1\n" + 9 * b"a,b\n", "init.row_width", ":2: 3 cells"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_one_line(file: Write, content: bytes, code: str, why: str) -> None:
    with raises(code, match=why):
        read_rows(file("pairs.csv", content))


def test_a_folder_a_missing_file_and_an_unreadable_one(tmp_path: Path, file: Write) -> None:
    with raises("init.no_data", match="a folder"):
        read_rows(tmp_path)
    with raises("init.no_data", match="no such file"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "none.csv")
    with raises("init.no_data", match="broken link"):
        read_rows(tmp_path / "link.csv")
    large = tmp_path / "large.csv"
    with large.open("wb") as stream:
        stream.truncate((1 << 28) + 1)
    with raises("init.unreadable_data", match="larger"):
        read_rows(large)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.txt"])
def test_json_by_lines_and_as_an_array(file: Write, name: str) -> None:
    rows = [{"question": question, "query": sql} for question, sql in questions(3)]
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    table = read_rows(file(name, text))
    assert (table.columns, table.rows) == (["question", "query"], rows)


@pytest.mark.parametrize("text", ["[1, 2]", '{"question": "a"}\nnot JSON', '{"a": 1, "a": 2}'])
def test_json_that_is_no_table(file: Write, text: str) -> None:
    with raises("init.bad_json", match="pairs.jsonl"):
        read_rows(file("pairs.jsonl", text))


def test_parquet(file: Write, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"question": question, "sql": sql} for question, sql in questions(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert read_rows(tmp_path / "pairs.parquet").rows == rows


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with raises("init.no_parquet", match=r"\[train\]"):
        read_rows(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    subprocess.run(["mkfifo", str(tmp_path / "pipe.csv")], check=True)
    with raises("init.no_data", match="a pipe"):
        read_rows(tmp_path / "pipe.csv")


@pytest.mark.parametrize("delimiter", [";", ",", "^"])
def test_excels_line_with_the_separator(file: Write, delimiter: str) -> None:
    table = read_rows(file("pairs.csv", f"sep={delimiter}\n" + as_csv(questions(5), delimiter=delimiter)))
    assert table.columns == HEADER and len(table.rows) == 5
    assert table.places[0].endswith(":3")


def test_a_schema_is_no_table_of_pairs(file: Write) -> None:
    with raises("init.not_a_table", match="a schema is given with --db"):
        read_rows(file("dump.sql", "CREATE TABLE a (b int, c int);\n"))
