"""The real Spider data set: every record of the shared folder is read and accounted for."""

from pathlib import Path

import pytest

from finetune.config.schema import SourceSection
from finetune.data.prepared import Prepared
from finetune.data.records import SPLITS
from finetune.data.split import question_key, sql_key
from tests.helpers.data_examples import read_jsonl, run_prepare

SPIDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "spider"

pytestmark = [
    pytest.mark.repeat,
    pytest.mark.skipif(not SPIDER.is_dir(), reason="the shared Spider folder is not beside this checkout"),
]


def sources() -> list[SourceSection]:
    """train_spider.json is split into train and val; dev.json, on other databases, is the test set unchanged."""
    return [
        SourceSection(kind="spider", path=str(SPIDER), files=["train_spider.json"]),
        SourceSection(kind="spider", path=str(SPIDER), files=["dev.json"], split="test"),
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return run_prepare(sources(), tmp_path_factory.mktemp("spider") / "set", val_fraction=0.05, test_fraction=0.0)


def test_every_record_of_spider_is_read_and_accounted_for(prepared: Prepared) -> None:
    manifest = prepared.manifest
    assert [source["read"] for source in manifest["sources"]] == [6286, 493]
    assert manifest["counts"] == {
        "read": 6779,
        "train": 5952,
        "val": 316,
        "test": 493,
        "rejected": 18,
        "left_out_by_max_train_records": 0,
    }
    assert manifest["rejected"] == {"duplicate_question": 8, "gold_fails": 3, "leak": 7}
    assert manifest["without_database"] == {"train": 0, "val": 0, "test": 0}
    assert {split: len(counts) for split, counts in manifest["records_per_database"].items()} == {
        "train": 132,
        "val": 91,
        "test": 10,
    }
    kept = {record.id for split in SPLITS for record in prepared.records(split)}
    rejected = {
        f"spider/{Path(item['file']).stem}-{item['line']}" for item in read_jsonl(prepared.folder / "rejected.jsonl")
    }
    assert len(kept) + len(rejected) == 6779
    assert kept | rejected == {f"spider/train_spider-{n}" for n in range(1, 6287)} | {
        f"spider/dev-{n}" for n in range(1, 494)
    }


def test_gold_queries_that_do_not_run_are_the_known_three(prepared: Prepared) -> None:
    failing = [item for item in read_jsonl(prepared.folder / "rejected.jsonl") if item["reason"] == "gold_fails"]
    assert [(item["line"], item["record"]["db_id"], item["detail"]) for item in failing] == [
        (2704, "assets_maintenance", "no such table: Ref_Company_Types"),
        (3982, "document_management", "ORDER BY clause should come after INTERSECT not before"),
        (3983, "document_management", "ORDER BY clause should come after INTERSECT not before"),
    ]


def test_splits_of_spider_share_no_question_and_no_gold_sql(prepared: Prepared) -> None:
    for key in (question_key, sql_key):
        found = {split: {key(record) for record in prepared.records(split)} for split in SPLITS}
        assert not found["train"] & found["val"]
        assert not found["train"] & found["test"]
        assert not found["val"] & found["test"]


def test_every_test_question_of_spider_has_its_database_and_schema(prepared: Prepared) -> None:
    for record in prepared.records("test"):
        database = prepared.database(record)
        assert database is not None
        assert database.is_file()
        assert "CREATE TABLE" in record.schema.upper()


def test_preparing_spider_again_changes_nothing(prepared: Prepared) -> None:
    again = run_prepare(sources(), prepared.folder, val_fraction=0.05, test_fraction=0.0)
    assert not again.changed
    assert again.manifest_hash == prepared.manifest_hash


def test_spider_split_by_database_keeps_databases_apart(tmp_path: Path) -> None:
    both = [SourceSection(kind="spider", path=str(SPIDER), files=["train_spider.json", "dev.json"])]
    manifest = run_prepare(both, tmp_path / "set", split_by="database").manifest
    databases = [set(manifest["records_per_database"][split]) for split in SPLITS]
    assert sum(map(len, databases)) == len(set.union(*databases)) == 142
    assert manifest["rejected"] == {"duplicate_question": 8, "gold_fails": 3, "leak": 62}
