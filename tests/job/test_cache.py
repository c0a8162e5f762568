"""The data cache in the bucket: its keys, and that a set is copied completely or not at all, also with two jobs at once."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import yaml

from finetune.config.load import data_key, load_config, to_yaml
from finetune.job.cache import DataCache, copy_set, set_id
from tests.helpers.errors import raises
from tests.helpers.machine_fixture import CONFIG, ROOT, lay_out_set, sha256


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_key_is_the_same_as_in_existing_buckets(path: Path) -> None:
    """Earlier versions computed it from the output of `finetune config`."""
    printed = yaml.safe_load(to_yaml(load_config(path)))["data"]
    earlier = hashlib.sha256(json.dumps(printed, sort_keys=True).encode()).hexdigest()[:12]
    assert data_key(load_config(path)) == earlier


def test_the_key_depends_on_the_data_section_only(config: Path) -> None:
    key = data_key(load_config(config))
    assert data_key(load_config(config, ["lora.r=4", "training.seed=7"])) == key
    assert data_key(load_config(config, ["data.seed=7"])) != key


def test_a_set_is_identified_by_its_manifest(tmp_path: Path) -> None:
    assert set_id(tmp_path) == ""
    lay_out_set(tmp_path / "set", "one")
    assert set_id(tmp_path / "set") == sha256(tmp_path / "set" / "manifest.json")[:12]


def test_the_manifest_is_copied_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out_set(tmp_path / "set", "one")
    names = []
    replace = os.replace

    def cut_off(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            raise OSError("the machine has gone")
        names.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut_off)
        with pytest.raises(OSError, match="gone"):
            copy_set(tmp_path / "set", tmp_path / "copy")
    assert names == ["shop.sqlite", "train.jsonl"]
    assert set_id(tmp_path / "copy") == ""
    copy_set(tmp_path / "set", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(tmp_path / "set")


def test_two_jobs_copy_one_set_at_once_and_a_third_reads_it(tmp_path: Path) -> None:
    """Once the manifest exists, every file is complete, and stays so while the other job is still writing."""
    lay_out_set(tmp_path / "set", "x" * 200_000)
    whole, target, torn = tree(tmp_path / "set"), tmp_path / "bucket" / "set", []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if set_id(target) and (found := tree(target)) != whole:
                torn.append({name: len(text) for name, text in found.items()})

    def write() -> None:
        for _ in range(30):
            copy_set(tmp_path / "set", target)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not torn
    assert tree(target) == whole
    assert not list(target.rglob("*.part"))


def test_a_copied_set_has_no_files_of_the_previous_one(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config)
    folder = Path(loaded.data.output_dir)
    lay_out_set(tmp_path / "new", "new")
    kept = DataCache(tmp_path / "bucket", tmp_path / "state")
    copy_set(tmp_path / "new", kept.bucket / f"{folder.name}-{set_id(tmp_path / 'new')}")
    lay_out_set(folder, "old")
    (folder / "databases" / "gone").mkdir()
    (folder / "databases" / "gone" / "gone.sqlite").touch()
    kept.lay_out(loaded, sha256(tmp_path / "new" / "manifest.json"), prepare=unexpected)
    assert tree(folder) == tree(tmp_path / "new")


def test_a_set_whose_manifest_names_other_settings_is_not_used(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither from the laptop nor from the bucket, except for a run that began with it."""
    loaded = load_config(config, ["data.max_train_records=4"])
    folder = Path(loaded.data.output_dir)
    other = {"settings": {"max_train_records": None}}
    cache = DataCache(tmp_path / "bucket", tmp_path / "state")

    def lay_out_other(place: Path) -> None:
        lay_out_set(place, "other")
        (place / "manifest.json").write_text(json.dumps(other))

    def prepare() -> None:
        assert not folder.exists() or not list(folder.iterdir())
        lay_out_set(folder, "right")

    lay_out_other(folder)
    identity = set_id(folder)
    copy_set(folder, cache.bucket / f"{folder.name}-{identity}")
    (cache.bucket / "by-config").mkdir()
    (cache.bucket / "by-config" / data_key(loaded)).write_text(identity)
    used = sha256(folder / "manifest.json")
    cache.lay_out(loaded, "", prepare)
    assert (folder / "train.jsonl").read_text() == "right"
    said = capsys.readouterr().err
    for place in (folder, cache.bucket / f"{folder.name}-{identity}"):
        assert f"{place} is not used: prepared with data.max_train_records null, this config has 4" in said
    cache.lay_out(loaded, used, prepare=unexpected)
    assert (folder / "train.jsonl").read_text() == "other"


def test_a_preparation_without_a_set_is_reported(config: Path, tmp_path: Path) -> None:
    with raises("job.nothing_prepared", match=r"data\.output_dir"):
        DataCache(tmp_path / "bucket", tmp_path / "state").lay_out(load_config(config), "", prepare=lambda: None)


def unexpected() -> None:
    raise AssertionError("the set is in the bucket")


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


def test_files_of_an_interrupted_copy_do_not_prevent_preparation(config: Path, tmp_path: Path) -> None:
    """`finetune data prepare` refuses a folder with files other than a prepared set."""
    loaded = load_config(config)
    folder = Path(loaded.data.output_dir)
    (folder / "databases").mkdir(parents=True)
    for name in (".train.jsonl.ab12.part", "train.jsonl"):
        (folder / name).write_text("half", encoding="utf-8")

    def prepare() -> None:
        assert list(folder.iterdir()) == []
        lay_out_set(folder, "one")

    (tmp_path / "state").mkdir()
    DataCache(tmp_path / "bucket", tmp_path / "state").lay_out(loaded, "", prepare)
    assert set_id(folder)


@pytest.mark.parametrize(
    "text", ["x/../../out", "../" * 4, "/etc", "A" * 12, "a" * 13, "a" * 11, "a" * 12 + "\nb", "*"]
)
def test_an_id_that_is_no_id_is_refused_where_it_is_read(text: str, config: Path, tmp_path: Path) -> None:
    cache, loaded = DataCache(tmp_path / "bucket", tmp_path / "state"), load_config(config)
    pointer = tmp_path / "bucket" / "by-config" / data_key(loaded)
    pointer.parent.mkdir(parents=True)
    pointer.write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with raises("job.bad_set_id", match="by-config.*expected the id of a prepared set"):
        cache.lay_out(loaded, "", lambda: pytest.fail("not prepared"))
    with raises("job.bad_set_id", match="manifest_sha256: expected the id"):
        cache.lay_out(loaded, "../../../../x", lambda: pytest.fail("not prepared"))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_part_of_a_set_is_not_deleted(config: Path, tmp_path: Path) -> None:
    """data.output_dir may be a folder with the user's own files, by mistake."""
    loaded = load_config(config)
    folder = Path(loaded.data.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mine.jsonl", "train.jsonl.bak", "manifest.txt"):
        (folder / name).write_text("mine")
    (folder / "train.jsonl").write_text("half a copy")
    with raises("job.nothing_prepared"):
        DataCache(tmp_path / "bucket", tmp_path / "state").lay_out(loaded, "", lambda: None)
    assert {path.name for path in folder.iterdir()} == {"mine.jsonl", "train.jsonl.bak", "manifest.txt"}
