"""A small shop database and records for it, used by the tests of the data modules."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from finetune.config.schema import DataSection, SourceSection
from finetune.data.prepare import prepare
from finetune.data.prepared import Prepared

SCHEMA = "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);"


def make_database(folder: Path, db_id: str = "shop", items: int = 3) -> Path:
    path = folder / db_id / f"{db_id}.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute(SCHEMA)
    connection.executemany("INSERT INTO item VALUES (?, ?, ?)", [(i, f"item {i}", i * 1.5) for i in range(items)])
    connection.commit()
    connection.close()
    return path


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A record whose question and gold SQL are unique to its number."""
    fields = {
        "id": f"r{number}",
        "db_id": "shop",
        "question": f"Which item has number {number}?",
        "sql": f"SELECT name FROM item WHERE id = {number}",
        "schema": SCHEMA,
    }
    return fields | changes


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows that are strings already are written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [item if isinstance(item, str) else json.dumps(item) for item in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def jsonl_source(path: Path, **settings: Any) -> SourceSection:
    return SourceSection(kind="jsonl", path=str(path), **settings)


def data_section(sources: list[SourceSection], output_dir: Path | str, **changes: Any) -> DataSection:
    """A data section with larger held-out splits than the default."""
    return DataSection(sources, str(output_dir), **({"val_fraction": 0.2, "test_fraction": 0.2} | changes))


def run_prepare(
    sources: list[SourceSection],
    output_dir: Path,
    *,
    max_seq_length: int = 2048,
    tokenizer: Any = None,
    tokenizer_name: str | None = None,
    **changes: Any,
) -> Prepared:
    """changes: keys of the data section to override."""
    return prepare(
        data_section(sources, output_dir, **changes),
        max_seq_length=max_seq_length,
        timeout_seconds=10.0,
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_name,
        progress=False,
    )


def described(prepared: Path) -> dict[str, Any]:
    """The section `data` of a config that a set was prepared from, with the keys that its manifest names."""
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    unknown = ("read", "faulty")
    sources = [{name: value for name, value in one.items() if name not in unknown} for one in manifest["sources"]]
    settings = {name: value for name, value in manifest["settings"].items() if name != "max_seq_length"}
    return settings | {"sources": sources, "output_dir": str(prepared)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
