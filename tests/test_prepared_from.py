"""Prepared data are used only for a config that describes them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DataSection, SourceSection
from finetune.prepared_folder import MANIFEST
from finetune.prepared_from import check_prepared_from, differences, is_prepared_from, settings_of
from tests.helpers.errors import raises

SPIDER = SourceSection("spider", "spider", files=["train_spider.json"])
HUB = SourceSection("huggingface", "owner/pairs", revision="a" * 40, subset="train")


def data(*sources: SourceSection, **values: Any) -> DataSection:
    return DataSection(list(sources) or [SourceSection("jsonl", "data.jsonl")], "prepared", **values)


def manifest(section: DataSection) -> dict[str, Any]:
    sources = [asdict(source) | {"read": 5, "faulty": 0} for source in section.sources]
    return {"settings": settings_of(section, 256), "sources": sources}


def differ(before: DataSection, now: DataSection) -> list[str]:
    return differences(now, manifest(before))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (data(), data(max_train_records=4), "data.max_train_records null, this config has 4"),
        (data(val_fraction=0.3), data(), "data.val_fraction 0.3, this config has 0.05"),
        (data(), data(test_fraction=0.3), "data.test_fraction 0.1, this config has 0.3"),
        (data(), data(split_by="database"), "data.split_by 'question', this config has 'database'"),
        (data(), data(statements="select"), "data.statements 'all', this config has 'select'"),
        (data(statements="select"), data(), "data.statements 'select', this config has 'all'"),
        (data(seed=3), data(), "data.seed 3, this config has 13"),
        (data(), data(SourceSection("jsonl", "h.jsonl")), "data.sources[0].path 'data.jsonl', this config has 'h.jsonl'"),
        (data(), data(SPIDER, SPIDER), "the number of data.sources 1, this config has 2"),
        (data(SPIDER), data(replace(SPIDER, files=["dev.json"])),
         """data.sources[0].files ["train_spider.json"], this config has ["dev.json"]"""),
        (data(SPIDER), data(replace(SPIDER, split="test")), "data.sources[0].split 'auto', this config has 'test'"),
        (data(SPIDER), data(replace(SPIDER, dialect="mysql")), "data.sources[0].dialect 'sqlite', this config has 'mysql'"),
        (data(SPIDER), data(replace(SPIDER, databases="x")), "data.sources[0].databases null, this config has 'x'"),
        (data(HUB), data(replace(HUB, path="other/pairs")),
         "data.sources[0].path 'owner/pairs', this config has 'other/pairs'"),
        (data(HUB), data(replace(HUB, columns={"sql": "query"})),
         """data.sources[0].columns {}, this config has {"sql": "query"}"""),
    ],
)  # fmt: skip
def test_each_setting_that_decides_what_is_prepared_is_named(
    before: DataSection, now: DataSection, message: str
) -> None:
    assert differ(before, now) == [message]
    with raises("data.other_settings", match="^here: was prepared with .*; run `finetune data prepare CONFIG`"):
        check_prepared_from(Path("here"), manifest(before), now)


def test_every_difference_is_named_in_one_line() -> None:
    with raises("data.other_settings", match="data.seed 13, this config has 1; with data.max_train_records null, this"):
        check_prepared_from(Path("here"), manifest(data()), data(seed=1, max_train_records=4))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (data(), replace(data(), output_dir="elsewhere")),
        (data(), data(schema_format="compact")),  # only prompts have it, which are compared themselves
        (data(SPIDER), data(replace(SPIDER, databases="spider/database"))),
        (data(replace(SPIDER, dialect="mssql")), data(replace(SPIDER, dialect="T-SQL"))),
    ],
)
def test_what_changes_nothing_is_no_difference(before: DataSection, now: DataSection) -> None:
    assert differ(before, now) == []


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"settings": {"seed": 13}, "sources": [{"path": "data.jsonl"}]},
        {"settings": None, "sources": "data.jsonl"},
        {"sources": ["data.jsonl"]},
    ],
)
def test_a_manifest_of_an_earlier_version_is_compared_as_far_as_it_goes(old: dict[str, Any]) -> None:
    assert differences(data(max_train_records=4), old) == []
    assert is_prepared_from(Path("no/such/folder"), data()) is False


def paths(before: str, now: str) -> bool:
    found = differ(data(SourceSection("jsonl", before)), data(SourceSection("jsonl", now)))
    return found == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("data/x.jsonl", "./data//x.jsonl"),
        ("data/x.jsonl", "../data/x.jsonl"),  # typed in a folder beside it
        ("shop/data/x.jsonl", "data/x.jsonl"),  # typed in a folder above it
        ("/home/me/shop/data/x.jsonl", "data/x.jsonl"),
        ("/home/me/x.jsonl", "/root/x.jsonl"),  # ~/x.jsonl on another computer, or a project that was moved
    ],
)
def test_a_path_written_differently_is_the_same_where_it_cannot_be_looked_up(before: str, now: str) -> None:
    assert paths(before, now)
    assert paths(now, before)


@pytest.mark.parametrize(
    ("before", "now"), [("a/x.jsonl", "b/x.jsonl"), ("/a/x.jsonl", "/a/y.jsonl"), ("x.jsonl", "..")]
)
def test_another_path_is_another(before: str, now: str) -> None:
    assert not paths(before, now)


def test_paths_that_are_here_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, text in (("a", "1"), ("b", "2"), ("copy", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(text)
    (tmp_path / "link").symlink_to("a")
    assert paths("link/x.jsonl", str(tmp_path / "a" / "x.jsonl"))
    assert paths(str(tmp_path / "a" / "x.jsonl"), "copy/x.jsonl"), "a copied project"
    assert not paths("a/x.jsonl", "b/x.jsonl")
    assert not paths(str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl"))
    (tmp_path / "b" / "more").touch()
    assert paths("link", "copy"), "folders with the same names in them"
    assert not paths("a", "b")


def test_a_manifest_that_cannot_be_read_is_for_others_to_refuse(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    assert is_prepared_from(tmp_path, data())
