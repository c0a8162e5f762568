"""prepare, check and load_prepared on our own JSONL. Splitting and the other sources have test files of their own."""

import errno
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceSection
from finetune.data.check import Findings, check
from finetune.data.prepared import load_prepared
from finetune.data.prompts import PromptTemplate
from finetune.data.records import SPLITS
from finetune.prepared_from import check_prepared_from, is_prepared_from
from finetune.runtime.files import sha256_file
from tests.helpers.data_examples import (
    SCHEMA,
    data_section,
    files_of,
    jsonl_source,
    make_database,
    read_jsonl,
    row,
    run_prepare,
    without,
    write_jsonl,
)
from tests.helpers.errors import raises


@pytest.fixture
def shop(tmp_path: Path) -> SourceSection:
    """A hundred valid records with a database."""
    make_database(tmp_path / "databases")
    path = write_jsonl(tmp_path / "questions.jsonl", [row(number) for number in range(100)])
    return jsonl_source(path, databases=str(tmp_path / "databases"))


def run_check(sources: list[SourceSection], timeout_seconds: float = 10.0) -> Findings:
    return check(data_section(sources, "nowhere"), timeout_seconds=timeout_seconds, progress=False)


class Words:
    """A tokenizer with one token per word."""

    eos_token_id = 0

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def test_prepared_folder_is_what_its_manifest_says(tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    result = run_prepare([shop], output)
    manifest = json.loads((output / "manifest.json").read_text())
    assert result.changed
    assert result.manifest == manifest
    assert set(manifest["files"]) == set(files_of(output)) - {"manifest.json", "sources.json"}
    for name, listed in manifest["files"].items():
        assert listed == {"bytes": (output / name).stat().st_size, "sha256": sha256_file(output / name)}
    sizes: dict[str, int] = {split: len(read_jsonl(output / f"{split}.jsonl")) for split in SPLITS}
    assert manifest["counts"] == {"read": 100, **sizes, "rejected": 0, "left_out_by_max_train_records": 0}
    assert sum(sizes.values()) == 100
    assert manifest["prompt"] == PromptTemplate().identity()
    assert manifest["sources"][0]["path"] == shop.path
    assert manifest["sources"][0]["read"] == 100
    assert {record["split"] for record in read_jsonl(output / "val.jsonl")} == {"val"}


def test_same_inputs_give_the_same_bytes(tmp_path: Path, shop: SourceSection) -> None:
    for name in ("first", "second"):
        run_prepare([shop], tmp_path / name, tokenizer=Words())
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_preparing_the_same_data_again_changes_nothing_and_says_so(tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    first = run_prepare([shop], output)
    inode = (output / "manifest.json").stat().st_ino
    again = run_prepare([shop], output)
    assert first.changed
    assert not again.changed
    assert again.manifest_hash == first.manifest_hash
    assert (output / "manifest.json").stat().st_ino == inode


def test_a_source_that_has_changed_is_to_be_prepared_again(tmp_path: Path, shop: SourceSection) -> None:
    """Also where it changes nothing in the set: only preparing can tell."""
    output, data = tmp_path / "prepared", data_section([shop], str(tmp_path / "prepared"))
    prepared = run_prepare([shop], output)
    check_prepared_from(output, prepared.manifest, data)
    with Path(shop.path).open("a") as file:
        file.write("\n")
    with raises(
        "data.source_changed", match=r"prepared: was prepared before .*questions\.jsonl changed; run `finetune data"
    ):
        check_prepared_from(output, prepared.manifest, data)
    assert not is_prepared_from(output, data)
    assert not run_prepare([shop], output).changed
    check_prepared_from(output, prepared.manifest, data)
    Path(shop.path).unlink()
    assert is_prepared_from(output, data), "on another machine, say, which has the prepared data alone"


def test_other_data_replaces_the_prepared_set_completely(tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    first = run_prepare([shop], output)
    write_jsonl(Path(shop.path), [row(number) for number in range(50)])
    second = run_prepare([shop], output)
    assert second.changed
    assert second.manifest_hash != first.manifest_hash
    assert second.manifest["counts"]["read"] == 50
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_corrupt_prepared_set_is_fixed_by_preparing_again(tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    run_prepare([shop], output)
    (output / "train.jsonl").write_text("")
    assert run_prepare([shop], output).changed
    load_prepared(output)


def test_prepared_folder_works_on_another_machine(tmp_path: Path, shop: SourceSection) -> None:
    run_prepare([shop], tmp_path / "here" / "prepared")
    shutil.move(tmp_path / "here" / "prepared", tmp_path / "there")
    shutil.rmtree(tmp_path / "databases")
    prepared = load_prepared(tmp_path / "there", progress=False)
    record = prepared.records("test")[0]
    database = prepared.database(record)
    assert database == tmp_path / "there" / "databases" / "shop" / "shop.sqlite"
    assert database.is_file()


def test_database_of_train_alone_is_not_copied(tmp_path: Path) -> None:
    for name in ("shop", "depot"):
        make_database(tmp_path / "databases", name)
    rows = [row(1, db_id="depot", split="train"), row(2, split="test"), row(3, split="val")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows), databases=str(tmp_path / "databases"))
    prepared = run_prepare([source], tmp_path / "prepared")
    assert prepared.database(prepared.records("train")[0]) is None
    assert [path.name for path in (tmp_path / "prepared" / "databases").iterdir()] == ["shop"]


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_changed_or_missing_file_is_noticed_when_loading(tmp_path: Path, shop: SourceSection, change: str) -> None:
    output = tmp_path / "prepared"
    run_prepare([shop], output)
    if change == "edit":
        (output / "test.jsonl").write_text((output / "test.jsonl").read_text().replace("item", "ITEM", 1))
    else:
        (output / "test.jsonl").unlink()
    with raises("data.changed", match=r"test\.jsonl: (changed since|missing).*data prepare"):
        load_prepared(output)


def test_loading_what_was_never_prepared_names_the_command(tmp_path: Path) -> None:
    with raises("file.missing", match=r"manifest\.json.*`finetune data prepare"):
        load_prepared(tmp_path)


BAD_RECORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "SQL that does not parse": ({"sql": "SELECT FROM WHERE"}, "sql_does_not_parse", ""),
    "SQL that is no query": ({"sql": "DELETE FROM item"}, "sql_does_not_parse", "not a query"),
    "unknown column": ({"sql": "SELECT colour FROM item"}, "gold_fails", "no such column: colour"),
    "table that the schema does not show": (
        {
            "dialect": "snowflake",
            "schema": "CREATE OR REPLACE TABLE client (id int)",
            "sql": "SELECT 1 FROM client, orders",
        },
        "table_not_shown",
        "the gold SQL reads orders, which the schema does not create",
    ),
    "column that the schema does not show, in a dialect that no engine runs": (
        {
            "dialect": "postgres",
            "schema": "CREATE TABLE patient (id int, name text)",
            "sql": "SELECT p.haarfarbe, age FROM patient p",
        },
        "column_not_shown",
        "the gold SQL reads age, p.haarfarbe: no such column in the schema",
    ),
    "schema that is no DDL": ({"schema": "item: id, name"}, "schema_does_not_parse", "no CREATE TABLE"),
    "missing database": ({"db_id": "absent"}, "database_missing", "absent.sqlite"),
    "no SQLite file": ({"db_id": "text"}, "database_unreadable", "not a SQLite file"),
    "same id": ({"id": "r5"}, "duplicate_id", "questions.jsonl:6"),
    "same question": ({"question": " which ITEM has number  5?"}, "duplicate_question", "questions.jsonl:6"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_rejected_record_is_listed_with_file_line_and_reason(tmp_path: Path, shop: SourceSection, case: str) -> None:
    changes, reason, detail = BAD_RECORDS[case]
    text = tmp_path / "databases" / "text" / "text.sqlite"
    text.parent.mkdir()
    text.write_text("id,name\n1,screw\n")
    bad = row(1000) | changes
    write_jsonl(Path(shop.path), [*(row(number) for number in range(50)), bad])
    manifest = run_prepare([shop], tmp_path / "prepared").manifest
    (rejected,) = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert (rejected["file"], rejected["line"], rejected["reason"]) == (shop.path, 51, reason)
    assert detail in rejected["detail"]
    assert rejected["record"] == bad
    assert manifest["rejected"] == {reason: 1}
    assert manifest["counts"]["rejected"] == 1
    assert sum(manifest["counts"][split] for split in SPLITS) == 50


def test_gold_that_never_ends_is_rejected(tmp_path: Path, shop: SourceSection) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    write_jsonl(Path(shop.path), [*(row(number) for number in range(50)), row(50, sql=endless)])
    findings = run_check([shop], timeout_seconds=0.2)
    assert [rejection.reason for rejection in findings.rejections] == ["gold_hits_limit"]
    assert findings.problems == []


@pytest.mark.parametrize("case", [case for case in BAD_RECORDS if not case.startswith("same")])
def test_source_with_too_many_faulty_records_stops_and_names_the_first(
    tmp_path: Path, shop: SourceSection, case: str
) -> None:
    (tmp_path / "databases" / "text").mkdir()
    (tmp_path / "databases" / "text" / "text.sqlite").write_text("no database")
    changes, reason, _ = BAD_RECORDS[case]
    bad = [row(number) | changes for number in (100, 101, 102)]
    write_jsonl(Path(shop.path), [*(row(number) for number in range(20)), *bad])
    with raises("data.refused") as error:
        run_prepare([shop], tmp_path / "prepared")
    assert str(error.value).startswith(f"{shop.path}:21: {reason}: ")
    assert "3 of 23 records" in str(error.value)
    assert "finetune data check" in str(error.value)
    assert not (tmp_path / "prepared").exists()


BAD_LINES = {
    "not JSON": "{not json}",
    "missing field": without(row(7), "question"),
    "unknown field": row(7, answer="?"),
    "wrong type": row(7, question=["?"]),
    "unknown dialect": row(7, dialect="sqlit"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_one_malformed_line_stops_and_nothing_is_written(tmp_path: Path, shop: SourceSection, case: str) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    write_jsonl(Path(shop.path), [*(row(number) for number in range(100)), BAD_LINES[case], "{"])
    with raises("data.refused") as error:
        run_prepare([shop], tmp_path / "prepared")
    assert str(error.value).startswith(f"{shop.path}:101: ")
    assert "and 1 more such lines" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_check_lists_every_fault_and_writes_nothing(tmp_path: Path, shop: SourceSection) -> None:
    before = files_of(tmp_path)
    write_jsonl(Path(shop.path), [row(1), "{", row(2, sql="SELECT FROM WHERE"), row(3, db_id="absent"), row(1)])
    findings = run_check([shop])
    assert [(item.candidate.line, item.reason) for item in findings.rejections] == [
        (2, "malformed"),
        (3, "sql_does_not_parse"),
        (4, "database_missing"),
        (5, "duplicate_id"),
    ]
    assert findings.problems
    assert f"{shop.path}:2: not JSON" in findings.problems[0]
    assert set(files_of(tmp_path)) == set(before)


def test_missing_and_empty_data_files_are_named(tmp_path: Path) -> None:
    with raises("data.not_found", match=r"absent\.jsonl"):
        run_prepare([jsonl_source(tmp_path / "absent.jsonl")], tmp_path / "prepared")
    (tmp_path / "empty.jsonl").write_text("\n")
    with raises("data.empty", match=r"data\.sources\[0\].*empty\.jsonl: empty"):
        run_prepare([jsonl_source(tmp_path / "empty.jsonl")], tmp_path / "prepared")


def test_missing_folder_of_databases_is_named(tmp_path: Path, shop: SourceSection) -> None:
    shop.databases = str(tmp_path / "absent")
    with raises("data.not_found", match=r"data\.sources\[0\]\.databases: .*absent: no such folder"):
        run_prepare([shop], tmp_path / "prepared")


def test_output_folder_with_other_files_is_refused(tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    output.mkdir()
    run_prepare([shop], output)  # an empty folder is fine
    (output / "notes.txt").write_text("mine")
    with raises("data.output_dir_taken", match=r"output_dir holds files that are not.*notes\.txt"):
        run_prepare([shop], output)
    foreign = write_jsonl(tmp_path / "foreign" / "train.jsonl", ["{}"])
    with raises("data.output_dir_taken", match=r"train\.jsonl"):
        run_prepare([shop], foreign.parent)
    with raises("data.output_dir_taken", match="output_dir is a file"):
        run_prepare([shop], foreign)
    assert foreign.read_text() == "{}\n"


def test_full_disk_leaves_the_old_set_and_no_partial_files(
    tmp_path: Path, shop: SourceSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "prepared"
    run_prepare([shop], output)
    before = files_of(output)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with raises("disk.full"):
        run_prepare([shop], output, seed=99)
    assert files_of(output) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_failure_during_the_swap_restores_the_old_set(
    tmp_path: Path, shop: SourceSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "prepared"
    run_prepare([shop], output)
    before = files_of(output)
    rename = os.rename

    def rename_all_but_new(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_all_but_new)
    with raises("disk.error", match="prepared: Device or resource busy"):
        run_prepare([shop], output, seed=99)
    assert files_of(output) == before


def test_token_lengths_count_prompt_answer_and_end_of_sequence(tmp_path: Path) -> None:
    template = PromptTemplate()
    rows = [row(1, split="train"), row(2, split="train", question="Which " + "very " * 50 + "long one?")]
    rows += [row(3, split="val"), row(4, split="test")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    short = len((template.render(schema=SCHEMA, question=rows[0]["question"]) + rows[0]["sql"]).split()) + 1
    answer = len(rows[0]["sql"].split()) + 1
    manifest = run_prepare([source], tmp_path / "prepared", tokenizer=Words(), max_seq_length=short).manifest
    tokens = manifest["tokens"]["train"]
    assert (tokens["p50"], tokens["completion"]) == (short, 2 * answer)
    assert tokens["max"] == tokens["p99"] == tokens["total"] - short > short + 40
    assert tokens["longer_than_max_seq_length"] == 1
    assert manifest["tokens"]["test"]["longer_than_max_seq_length"] == 0
    assert len(read_jsonl(tmp_path / "prepared" / "train.jsonl")) == 2, "counted, not cut"
    assert run_prepare([source], tmp_path / "without").manifest["tokens"] is None


def test_skeleton_overlap_counts_test_questions_whose_query_shape_was_trained(tmp_path: Path) -> None:
    rows = [
        row(1, split="train"),
        row(2, split="test", sql="select name  FROM item WHERE id=77"),
        row(3, split="test", sql="SELECT price FROM item WHERE id = 3"),
        row(4, split="val", sql='SELECT name FROM item WHERE id = "x y"'),
    ]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    overlap = run_prepare([source], tmp_path / "prepared").manifest["skeleton_overlap"]
    assert overlap == {
        "val": {"questions": 1, "skeleton_in_train": 1},
        "test": {"questions": 2, "skeleton_in_train": 1},
    }


def test_max_train_records_leaves_out_a_stated_number_of_train_only(tmp_path: Path, shop: SourceSection) -> None:
    everything = run_prepare([shop], tmp_path / "all")
    thinned = run_prepare([shop], tmp_path / "some", max_train_records=10)
    assert len(thinned.records("train")) == 10
    left_out = thinned.manifest["counts"]["left_out_by_max_train_records"]
    assert left_out == everything.manifest["counts"]["train"] - 10
    assert thinned.records("test") == everything.records("test")
    assert set(thinned.records("train")) < set(everything.records("train"))


def test_sql_of_another_dialect_is_parsed_as_such_and_not_run_on_sqlite(tmp_path: Path, shop: SourceSection) -> None:
    sql = "SELECT DISTINCT ON (name) name, price::text FROM item WHERE name ILIKE 'a%'"
    rows = [row(1, dialect="postgres", sql=sql, split="test"), row(2, split="train"), row(3, split="val")]
    write_jsonl(Path(shop.path), rows)
    prepared = run_prepare([shop], tmp_path / "prepared")
    assert prepared.manifest["counts"]["rejected"] == 0
    assert prepared.manifest["without_database"] == {"train": 0, "val": 0, "test": 1}


def test_dialect_of_the_source_holds_for_records_that_name_none(tmp_path: Path) -> None:
    sql = "SELECT DISTINCT ON (name) name FROM item"
    rows = [row(1, split="test"), row(2, sql=sql, split="train"), row(3, dialect="sqlite", split="val")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows), dialect="postgres")
    prepared = run_prepare([source], tmp_path / "prepared")
    assert [prepared.records(split)[0].dialect for split in SPLITS] == ["postgres", "sqlite", "postgres"]


def test_one_db_id_for_two_different_databases_is_refused(tmp_path: Path, shop: SourceSection) -> None:
    make_database(tmp_path / "other", items=9)
    path = write_jsonl(tmp_path / "more.jsonl", [row(number) for number in range(200, 250)])
    with raises("data.refused", match=r"db_id 'shop' means .* and they differ; rename one"):
        run_prepare([shop, jsonl_source(path, databases=str(tmp_path / "other"))], tmp_path / "prepared")


def test_a_database_that_another_program_has_open_is_copied_with_its_committed_rows(
    tmp_path: Path, shop: SourceSection
) -> None:
    with closing(sqlite3.connect(tmp_path / "databases" / "shop" / "shop.sqlite")) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("DELETE FROM item WHERE id = 1")
        writer.commit()
        writer.execute("DELETE FROM item")
        prepared = run_prepare([shop], tmp_path / "prepared")
    with closing(sqlite3.connect(prepared.folder / "databases" / "shop" / "shop.sqlite")) as copied:
        assert copied.execute("SELECT sum(id = 1), sum(id = 2) FROM item").fetchone() == (0, 1)


@pytest.mark.parametrize("name", ["../q.jsonl", "/etc/passwd", "databases/../../q.jsonl", "a\\b", "", "a\nb"])
def test_a_manifest_that_names_a_file_outside_is_refused(name: str, tmp_path: Path, shop: SourceSection) -> None:
    output = tmp_path / "prepared"
    run_prepare([shop], output)
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (output / "manifest.json").write_text(json.dumps(manifest))
    with raises("data.bad_manifest", match="is not a file of this folder; run"):
        load_prepared(output)
