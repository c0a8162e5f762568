"""Folders of CSV and parquet: texts that a reader could change, and files that it could not read."""

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceSection
from finetune.data.sources import open_source
from tests.helpers.errors import raises


@pytest.fixture
def csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for CSV files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


COLUMNS = {name: name for name in ("id", "db_id", "evidence", "question", "sql", "schema")}
HEADER = "id,db_id,evidence,question,sql,schema,other"
CELLS = ["007", "NA", "2000", "nan", "1e5", "None"]


def csv_section(folder: Path, **changes: Any) -> SourceSection:
    settings: dict[str, Any] = {"kind": "huggingface", "path": str(folder), "subset": "train", "columns": COLUMNS}
    return SourceSection(**settings | changes)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_keeps_every_text_as_it_is_written(csv: Path, suffix: str) -> None:
    rows = [
        HEADER.split(","),
        [*CELLS, "1"],
        ["010", "7", "", "1.10", "true", "00", "x"],
        ["a", "-", "null", "é", "2009-01-02", "", ""],
    ]
    text = "\n".join(("," if suffix == ".csv" else "\t").join(cells) for cells in rows)
    (csv / f"train{suffix}").write_text("\ufeff" + text, encoding="utf-8")
    candidates = open_source(csv_section(csv), "data.sources[0]", progress=False).candidates
    assert [[item.fields[name] for name in COLUMNS] for item in candidates] == [cells[:6] for cells in rows[1:]]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([7, 8], ["7", "8"]),
        ([7.0, None], ["7", None]),
        ([2000.5, 3.0], ["2000.5", "3"]),
        (["007", "NA"], ["007", "NA"]),
        ([10**18 + 1, 1], ["1000000000000000001", "1"]),
    ],
)
@pytest.mark.parametrize("field", ["id", "db_id", "evidence"])
def test_numbers_of_parquet_become_the_text_that_people_write(
    csv: Path, field: str, column: list[Any], expected: list[Any]
) -> None:
    datasets = pytest.importorskip("datasets")
    table = {name: ["x", "y"] for name in COLUMNS} | {field: column}
    datasets.Dataset.from_dict(table).to_parquet(str(csv / "train.parquet"))
    candidates = open_source(csv_section(csv), "data.sources[0]", progress=False).candidates
    assert [item.fields[field] for item in candidates] == expected


CSV_MISTAKES: dict[str, tuple[bytes, str, str]] = {
    "cp1252": (
        f"{HEADER}\na,b,c,Caf\u00e9?,d,e,f".encode("cp1252"),
        "data.bad_encoding",
        r"train\.csv:2: .*byte 0xe9.*iconv",
    ),
    "cp1252 header": ("id,pr\u00e9nom".encode("cp1252"), "data.bad_encoding", r"train\.csv:1: not UTF-8"),
    "UTF-16": (HEADER.encode("utf-16"), "data.bad_encoding", r"train\.csv: UTF-16"),
    "a cell too many": (
        f"{HEADER}\n{','.join('abcdefgh')}\n".encode(),
        "data.bad_csv",
        r"train\.csv: the first record has 8 cells",
    ),
    "a column twice": (
        f"{HEADER},sql\n".encode(),
        "data.repeated_column",
        "train.csv:1: the column 'sql' is there twice",
    ),
    "empty": (b"", "data.empty", "train.csv: empty"),
    "an endless cell": (b"x" * 200_000, "data.unreadable", "train.csv:1: not a line of CSV"),
    "semicolons": (
        HEADER.replace(",", ";").encode(),
        "data.missing_column",
        r"train\.csv has no column 'id'; it has id;db_id",
    ),
}


@pytest.mark.parametrize("case", CSV_MISTAKES)
def test_mistake_in_a_csv_file_is_named(csv: Path, case: str) -> None:
    raw, code, message = CSV_MISTAKES[case]
    (csv / "train.csv").write_bytes(raw)
    with raises(code, match=message):
        open_source(csv_section(csv), "data.sources[0]", progress=False)
