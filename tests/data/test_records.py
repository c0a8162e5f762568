import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.records import Record, read_lines, read_records, write_records
from tests.helpers.data_examples import row, without, write_jsonl
from tests.helpers.errors import raises

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip() != "")
NAMES = st.text("abcdefgäß_0 -.", min_size=1).filter(lambda text: text.strip() != "" and not text.startswith("."))
RECORDS = st.builds(
    Record,
    id=TEXT,
    db_id=NAMES,
    question=TEXT,
    sql=TEXT,
    schema=TEXT,
    dialect=st.sampled_from(["sqlite", "postgres"]),
    split=st.sampled_from([None, "train", "val", "test"]),
    evidence=st.none() | TEXT,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORDS, max_size=4))
def test_records_come_back_as_they_were_written(tmp_path: Path, records: list[Record]) -> None:
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(row(1))}\r\n\r\n{json.dumps(row(2))}".encode())
    assert [record.id for record in read_records(path)] == ["r1", "r2"]


BAD_LINES = {
    "not JSON": ('{"id": ', "not JSON"),
    "no object": ("[1, 2]", "expected a JSON object"),
    "missing field": (without(row(2), "sql"), "lacks the field sql"),
    "unknown field": (row(2, quesion="?"), "unknown field 'quesion' (did you mean question?)"),
    "wrong type": (row(2, question=7), "question: expected text, found a number"),
    "null": (row(2, schema=None), "schema: expected text, found null"),
    "empty": (row(2, sql="  "), "sql: empty"),
    "unknown split": (row(2, split="dev"), "split: expected one of train, val, test or null, found 'dev'"),
    "db_id that leaves its folder": (row(2, db_id="../secret"), "db_id: expected a plain name"),
    "db_id that is no folder name": (row(2, db_id=".."), "db_id: expected a plain name"),
    "half a surrogate pair": (row(2, question="\ud83d"), "question: holds half of a surrogate pair"),
    "repeated key": ('{"id": "a", "id": "b"}', "the key 'id' is there twice"),
    "repeated key inside": ('{"id": {"x": 1, "x": 2}}', "the key 'x' is there twice"),
    "nested too deeply": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_with_file_line_and_field(tmp_path: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    path = write_jsonl(tmp_path / "records.jsonl", [row(1), "", line, row(4)])
    with raises("data.bad_record") as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"id": "\xff"}\n')
    with raises("data.bad_record", match=r"records\.jsonl:2: not UTF-8"):
        read_records(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with raises("data.not_found", match="no such file"):
        read_records(tmp_path / "absent.jsonl")
    with raises("data.not_found", match="a folder; expected a JSONL file"):
        read_records(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    record = Record(id="a", db_id="shop", question="?", sql="SELECT 1", schema="x")
    write_records(path, [record])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_records(path, [record, replace(record, question=object())])  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_a_file_that_is_one_array_is_read(tmp_path: Path, indent: int | None, start: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(start + json.dumps([row(1), row(2)], indent=indent) + "\n", encoding="utf-8")
    assert [record.id for record in read_records(path)] == ["r1", "r2"]
    path.write_text(json.dumps([row(1), {"id": 7}], indent=indent), encoding="utf-8")
    with raises("data.bad_record", match=r"records\.json record 2: lacks the field db_id"):
        read_records(path)
    path.write_text(json.dumps([row(1), row(2)], indent=indent).replace('"sql":', '"sql": "", "sql":', 1))
    with raises("data.bad_record", match=r"records\.json record 1: the key 'sql' is there twice"):
        read_records(path)


ONE_ERROR = {
    "array that is not closed": ("[\n" + ",\n".join(json.dumps(row(n)) for n in range(9)), r":10: not a JSON array \("),
    "array with an error": ('[{"id": "a"},\n {"id": }]', r":2: not a JSON array \("),
    "object over several lines": (json.dumps(row(1), indent=1), ":1: a JSON object over several lines"),
    "objects over several lines": (
        "\n".join(json.dumps(row(n), indent=1) for n in range(9)),
        ":1: a JSON object over several",
    ),
    "object with an array": (json.dumps({"data": [row(1)]}, indent=1), ":1: a JSON object over several lines"),
}


@pytest.mark.parametrize("case", ONE_ERROR)
def test_a_file_that_is_no_jsonl_is_one_error(tmp_path: Path, case: str) -> None:
    text, message = ONE_ERROR[case]
    path = tmp_path / "records.json"
    path.write_text(text)
    with raises("data.bad_json", match=rf"records\.json{message}"):
        list(read_lines(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_one_error(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "records.jsonl"
    mark = "" if encoding == "utf-16" else "\ufeff"
    path.write_bytes((mark + json.dumps(row(1)) + "\n").encode(encoding) * 3)
    with raises("data.bad_encoding", match=r"records\.jsonl: UTF-16 text; save it as UTF-8"):
        list(read_lines(path))


def test_only_a_broken_first_line_is_a_fault_of_that_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "records.jsonl", ['{"id": "r0", "db_id":', row(1), row(2)])
    assert [bool(line.problem) for line in read_lines(path)] == [True, False, False]
    path = write_jsonl(path, [[1, 2], row(1)])
    assert [line.problem for line in read_lines(path)] == [None, None]
