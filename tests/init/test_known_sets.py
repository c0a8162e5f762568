"""Spider, BIRD, and folders that are neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.init.known_sets import ON_HUB, set_in_folder, set_on_hub, source_lines
from finetune.runtime.paths import expanded
from finetune.runtime.yaml_file import load_yaml
from tests.helpers.errors import raises

ENTRY = {"db_id": "shop", "question": "How many?", "query": "SELECT count(*) FROM item"}
BIRD = {"db_id": "shop", "question": "How many?", "SQL": "SELECT count(*) FROM item", "evidence": ""}


def folder(path: Path, *, entry: dict[str, str] = ENTRY, tables: bool = True, **files: int) -> Path:
    path.mkdir()
    for name, count in files.items():
        (path / f"{name}.json").write_text(json.dumps([entry] * count))
    if tables:
        (path / "tables.json").write_text("[]")
    return path


def test_dev_is_the_test_set_and_the_others_train(tmp_path: Path) -> None:
    found = set_in_folder(folder(tmp_path / "my spider", train_spider=3, train_others=2, dev=2, test=4))
    assert (found.train, found.test) == (("train_others.json", "train_spider.json"), ("dev.json",))
    assert (found.records, found.questions, found.left_out) == (5, 2, ("test.json",))
    sources = [load_yaml(line) for line in source_lines(found)]
    path = str(tmp_path / "my spider")
    assert sources == [
        {"kind": "spider", "path": path, "files": ["train_others.json", "train_spider.json"]},
        {"kind": "spider", "path": path, "files": ["dev.json"], "split": "test"},
    ]


def test_a_path_is_not_expanded_again(tmp_path: Path) -> None:
    path = folder(tmp_path / "$HOME it's", train=2)
    [source] = [load_yaml(line) for line in source_lines(set_in_folder(path))]
    assert expanded(source["path"]) == str(path)


def test_bird_and_a_set_with_one_file(tmp_path: Path) -> None:
    assert set_in_folder(folder(tmp_path / "bird", entry=BIRD, train=2, dev=1)).test == ("dev.json",)
    only = set_in_folder(folder(tmp_path / "only", dev=2))
    assert (only.train, only.test) == (("dev.json",), ())


def test_the_hub_id_has_its_pinned_commit() -> None:
    found = set_on_hub("premai-io/spider")
    assert found is not None and found.revision == ON_HUB["premai-io/spider"].revision
    first, second = [load_yaml(line) for line in source_lines(found)]
    assert first["revision"] == second["revision"] == found.revision and second["split"] == "test"


@pytest.mark.parametrize("text", ["pairs.csv", "some/pairs.csv", "./a/b", "/a/b"])
def test_a_path_is_no_hub_id(text: str) -> None:
    assert set_on_hub(text) is None


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "set").mkdir(parents=True)
    assert set_on_hub("some/set") is None
    with raises("init.unknown_set", match="hf download other/set"):
        set_on_hub("other/set")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with raises("init.no_known_set"):
        set_in_folder(folder(tmp_path / "a", tables=False, dev=2))
    with raises("init.no_known_set"):
        set_in_folder(folder(tmp_path / "b", entry={"question": "How?"}, dev=2))
    broken = folder(tmp_path / "c")
    (broken / "dev.json").write_text("[{")
    with raises("init.no_known_set", match="dev.json"):
        set_in_folder(broken)
