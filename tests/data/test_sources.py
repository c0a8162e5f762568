"""Spider-format folders and Hugging Face datasets, offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceSection
from finetune.data.records import SPLITS
from finetune.data.sources import open_source
from tests.helpers.data_examples import SCHEMA, make_database, read_jsonl, row, run_prepare, write_jsonl
from tests.helpers.errors import raises

TABLES = [
    {
        "db_id": "shop",
        "table_names_original": ["item"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "price"]],
        "table_names": ["item"],
        "column_names": [[-1, "*"], [0, "id"], [0, "name"], [0, "price"]],
        "column_types": ["text", "number", "text", "number"],
        "primary_keys": [1],
        "foreign_keys": [],
    }
]


def spider_folder(folder: Path, entries: list[Any], *, databases: bool = True, tables: bool = True) -> SourceSection:
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(entries))
    if tables:
        (folder / "tables.json").write_text(json.dumps(TABLES))
    if databases:
        make_database(folder / "database")
    return SourceSection(kind="spider", path=str(folder), files=["train.json"])


def entry(number: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "db_id": "shop",
        "question": row(number)["question"],
        "query": row(number)["sql"],
        "query_toks": ["x"],
    }
    return fields | changes


def test_spider_folder_takes_schema_and_databases_from_sqlite(tmp_path: Path) -> None:
    source = spider_folder(tmp_path / "set", [entry(number) for number in range(60)], tables=False)
    prepared = run_prepare([source], tmp_path / "prepared")
    record = prepared.records("test")[0]
    assert "CREATE TABLE item" in record.schema
    assert "price REAL" in record.schema
    assert record.id.startswith("set/train-")
    assert prepared.database(record) is not None
    assert sum(prepared.manifest["counts"][split] for split in SPLITS) == 60


def test_spider_folder_without_databases_takes_schemas_from_tables_json(tmp_path: Path) -> None:
    source = spider_folder(tmp_path / "set", [entry(number) for number in range(60)], databases=False)
    prepared = run_prepare([source], tmp_path / "prepared")
    record = prepared.records("test")[0]
    assert "item" in record.schema
    assert "price" in record.schema
    assert prepared.database(record) is None
    assert prepared.manifest["without_database"]["test"] == prepared.manifest["counts"]["test"]


def test_bird_spelling_and_evidence_are_understood(tmp_path: Path) -> None:
    bird = {"db_id": "shop", "question": "Cheap ones?", "SQL": "SELECT 1", "evidence": "cheap means below 2"}
    source = spider_folder(tmp_path / "set", [*(entry(number) for number in range(20)), bird | {"question_id": 3}])
    prepared = run_prepare([source], tmp_path / "prepared")
    (record,) = [r for split in SPLITS for r in prepared.records(split) if r.sql == "SELECT 1"]
    assert record.evidence == "cheap means below 2"


def test_faulty_spider_entries_are_rejected_by_position(tmp_path: Path) -> None:
    entries = [entry(number) for number in range(60)]
    entries[7] = {"db_id": "shop", "question": "No SQL?"}
    entries[8] = entry(8, db_id="absent")
    entries[9] = entry(9, question=None)
    source = spider_folder(tmp_path / "set", entries)
    run_prepare([source], tmp_path / "prepared")
    rejected = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert [(item["line"], item["reason"]) for item in rejected] == [
        (8, "malformed"),
        (9, "database_missing"),
        (10, "malformed"),
    ]
    assert rejected[0]["detail"] == "lacks the field query (or SQL)"
    assert rejected[1]["record"] == entries[8]


SPIDER_MISTAKES: dict[str, tuple[Callable[[SourceSection, Path], object], str, str]] = {
    "no question files": (
        lambda source, _: source.files.clear(),
        "data.no_files",
        r"sources\[0\]\.files: expected the question files",
    ),
    "missing question file": (
        lambda source, _: source.files.append("dev.json"),
        "data.not_found",
        r"dev\.json: no such file",
    ),
    "broken JSON": (
        lambda _, folder: (folder / "train.json").write_text("[\n{,}]"),
        "data.bad_json",
        r"train\.json:2: not JSON",
    ),
    "no array": (
        lambda _, folder: (folder / "train.json").write_text("{}"),
        "data.bad_json",
        "expected a JSON array",
    ),
    "empty array": (
        lambda _, folder: (folder / "train.json").write_text("[]"),
        "data.bad_json",
        "at least one entry",
    ),
    "no schemas": (
        lambda _, folder: (folder / "tables.json").unlink(),
        "data.no_schema",
        r"neither a folder database/ nor tables\.json",
    ),
    "broken tables.json": (
        lambda _, folder: (folder / "tables.json").write_text("[{}"),
        "data.bad_json",
        r"tables\.json",
    ),
}


@pytest.mark.parametrize("case", SPIDER_MISTAKES)
def test_mistake_in_a_spider_folder_is_named(tmp_path: Path, case: str) -> None:
    mistake, code, message = SPIDER_MISTAKES[case]
    source = spider_folder(tmp_path / "set", [entry(1)], databases=False)
    mistake(source, tmp_path / "set")
    with raises(code, match=message):
        open_source(source, "data.sources[0]")


@pytest.mark.parametrize("kind", ["spider", "huggingface"])
@pytest.mark.parametrize(
    ("path", "revision", "code", "message"),
    [
        (
            "owner/name",
            None,
            "data.not_found",
            "owner/name: no such folder in .*a Hugging Face dataset id needs a revision",
        ),
        ("./data/mine", None, "data.not_found", r"\./data/mine: no such folder in [^;]*$"),
        ("/data/mine", "abc", "data.not_found", "/data/mine: neither a folder nor a Hugging Face dataset id"),
        ("here", "abc", "data.revision_of_folder", r"sources\[0\]\.revision: here is a local folder"),
    ],
)
def test_hub_ids_are_distinguished_from_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, path: str, revision: str | None, code: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    columns = {"question": "q", "sql": "s", "schema": "c"}
    section = SourceSection(kind=kind, path=path, revision=revision, files=["train.json"], columns=columns)
    with raises(code, match=message):
        open_source(section, "data.sources[0]")


def test_spider_set_on_the_hub_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    entries = [entry(number) for number in range(60)]
    spider_folder(tmp_path / "snapshot", [*entries, entries[0]])
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    source = SourceSection(kind="spider", path="premai-io/spider", revision="2abe051", files=["train.json"])
    manifest = run_prepare([source], tmp_path / "prepared").manifest
    assert (asked["repo_id"], asked["repo_type"], asked["revision"]) == (
        "premai-io/spider",
        "dataset",
        "2abe051",
    )
    assert {"train.json", "tables.json", "database/*"} <= set(asked["allow_patterns"])
    assert manifest["sources"][0]["revision"] == "2abe051"
    (rejected,) = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert rejected["file"] == "premai-io/spider/train.json", "not the cache folder of this machine"
    assert read_jsonl(tmp_path / "prepared" / "test.jsonl")[0]["id"].startswith("spider/train-")


@pytest.mark.parametrize("kind", ["spider", "huggingface"])
def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    module = pytest.importorskip("huggingface_hub" if kind == "spider" else "datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(module, "snapshot_download" if kind == "spider" else "load_dataset", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", fail)
    columns = {"question": "q", "sql": "s", "schema": "c"}
    section = SourceSection(kind=kind, path="owner/name", revision="abc", files=["train.json"], columns=columns)
    with raises(
        "data.hub_unreachable",
        match=r"cannot fetch owner/name at revision abc .*no connection to https://.*the folder of a copy",
    ) as error:
        open_source(section, "data.sources[0]")
    assert "\n" not in str(error.value)


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceSection:
    """A local dataset with two splits, as the hub would provide it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    rows = {
        "prompt": [row(number)["question"] for number in range(60)],
        "answer": [row(number)["sql"] for number in range(60)],
        "context": [SCHEMA] * 60,
        "number": list(range(60)),
        "db": ["shop"] * 60,
    }
    rows["answer"][5] = None
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    columns = {"question": "prompt", "sql": "answer", "schema": "context"}
    return SourceSection(kind="huggingface", path=str(tmp_path / "set"), subset="train", columns=columns)


def test_huggingface_dataset_is_read_through_its_column_mapping(tmp_path: Path, parquet: SourceSection) -> None:
    prepared = run_prepare([parquet], tmp_path / "prepared")
    (rejected,) = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert (rejected["line"], rejected["reason"]) == (6, "malformed")
    assert rejected["detail"] == "sql: expected text, found null"
    records = [record for split in SPLITS for record in prepared.records(split)]
    assert len(records) == 59
    assert {record.schema for record in records} == {SCHEMA}
    assert len({record.db_id for record in records}) == 1, "examples of one schema share a database id"
    assert {record.id for record in records} == {f"set-{number}" for number in range(1, 61) if number != 6}


def test_huggingface_dataset_may_name_databases_instead_of_schemas(tmp_path: Path, parquet: SourceSection) -> None:
    make_database(tmp_path / "databases")
    parquet.columns = {"question": "prompt", "sql": "answer", "db_id": "db", "id": "number"}
    parquet.databases = str(tmp_path / "databases")
    prepared = run_prepare([parquet], tmp_path / "prepared")
    record = prepared.records("test")[0]
    assert "price REAL" in record.schema
    assert record.id.isdigit()
    assert prepared.database(record) is not None


HUGGINGFACE_MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown column": (
        {"columns": {"question": "q", "sql": "answer", "schema": "context"}},
        "data.missing_column",
        "has no column 'q'; it has",
    ),
    "unknown field": ({"columns": {"query": "answer"}}, "data.bad_columns", r"columns\.query: not a field of a record"),
    "no question": ({"columns": {"sql": "answer"}}, "data.bad_columns", "columns: question is missing"),
    "no schema": (
        {"columns": {"question": "prompt", "sql": "answer"}},
        "data.bad_columns",
        "columns: schema is missing",
    ),
    "several splits": (
        {"subset": None},
        "data.unknown_subset",
        r"sources\[0\]\.subset: .* has several splits, expected one of test, train",
    ),
    "unknown split": ({"subset": "dev"}, "data.unreadable", "cannot be read as a dataset .*dev"),
    "unknown dialect": ({"dialect": "sqlit"}, "sql.unknown_dialect", r"sources\[0\]\.dialect: .*sqlit"),
}


@pytest.mark.parametrize("case", HUGGINGFACE_MISTAKES)
def test_mistake_in_a_huggingface_source_is_named(parquet: SourceSection, case: str) -> None:
    changes, code, message = HUGGINGFACE_MISTAKES[case]
    for name, value in changes.items():
        setattr(parquet, name, value)
    with raises(code, match=message):
        open_source(parquet, "data.sources[0]", progress=False)


# Keys that a kind does not use, arrays, repeated keys, BIRD -------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("jsonl", "columns", {"sql": "query"}),
        ("jsonl", "revision", "abc"),
        ("jsonl", "subset", "train"),
        ("jsonl", "files", ["a.json"]),
        ("spider", "columns", {"sql": "query"}),
        ("spider", "subset", "train"),
        ("huggingface", "files", ["a.json"]),
    ],
)
def test_key_that_a_kind_of_source_does_not_use_is_refused(
    parquet: SourceSection, tmp_path: Path, kind: Any, name: str, value: Any
) -> None:
    section = parquet
    if kind == "jsonl":
        section = SourceSection(kind="jsonl", path=str(write_jsonl(tmp_path / "q.jsonl", [row(1)])))
    elif kind == "spider":
        section = spider_folder(tmp_path / "spider", [entry(1)])
    open_source(section, "data.sources[0]", progress=False)
    setattr(section, name, value)
    with raises("data.unused_key", match=rf"data\.sources\[0\]\.{name}: `kind: {kind}` does not use this key"):
        open_source(section, "data.sources[0]", progress=False)


def test_a_repeated_key_is_a_fault_of_its_record_alone(tmp_path: Path) -> None:
    source = spider_folder(tmp_path / "set", [entry(number) for number in range(30)])
    path = tmp_path / "set" / "train.json"
    text = json.dumps([entry(number) for number in range(30)], indent=1)
    path.write_text(text.replace('"query":', '"query": "SELECT 9", "query":', 1))
    run_prepare([source], tmp_path / "prepared")
    (rejected,) = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert (rejected["line"], rejected["reason"], rejected["detail"]) == (
        1,
        "malformed",
        "the key 'query' is there twice",
    )


def test_a_database_with_two_schemas_in_tables_json_is_refused(tmp_path: Path) -> None:
    source = spider_folder(tmp_path / "set", [entry(1)], databases=False)
    tables = tmp_path / "set" / "tables.json"
    tables.write_text(json.dumps([*TABLES, *TABLES]))
    open_source(source, "data.sources[0]")
    tables.write_text(json.dumps([*TABLES, TABLES[0] | {"table_names_original": ["things"]}]))
    with raises("data.bad_json", match=r"tables\.json record 2: another schema for shop"):
        open_source(source, "data.sources[0]")
    tables.write_text(json.dumps(TABLES).replace('"db_id":', '"db_id": "x", "db_id":'))
    with raises("data.bad_json", match=r"tables\.json record 1: the key 'db_id' is there twice"):
        open_source(source, "data.sources[0]")


@pytest.mark.parametrize(
    "layout",
    ["dev_databases", "dev_databases/dev_databases", "database", "dev_databases train_databases", "dev_tables.json"],
)
def test_bird_folder_needs_no_databases_key(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "bird"
    for part in layout.split(" "):
        if part.endswith(".json"):
            folder.mkdir()
            (folder / part).write_text(json.dumps(TABLES))
        else:
            make_database(folder / part, "shop" if "dev" in part or part == "database" else "other")
    bird = [{"db_id": "shop", "question": row(n)["question"], "SQL": row(n)["sql"], "evidence": ""} for n in range(60)]
    (folder / "dev.json").write_text(json.dumps(bird))
    prepared = run_prepare([SourceSection(kind="spider", path=str(folder), files=["dev.json"])], tmp_path / "prepared")
    record = prepared.records("test")[0]
    assert "CREATE TABLE item" in record.schema
    assert (prepared.database(record) is None) == layout.endswith(".json")


def test_bird_folder_with_databases_of_several_splits_asks_which(tmp_path: Path) -> None:
    for name in ("dev", "train"):
        make_database(tmp_path / "bird" / f"{name}_databases")
        (tmp_path / "bird" / f"{name}.json").write_text(json.dumps([entry(1)]))
    section = SourceSection(kind="spider", path=str(tmp_path / "bird"), files=["dev.json", "train.json"])
    with raises("data.no_schema", match="which of dev_databases, train_databases belongs to dev.json, train.json"):
        open_source(section, "data.sources[0]")
