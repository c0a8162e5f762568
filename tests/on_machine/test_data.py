"""How prepared data are copied between laptop, bucket and machine (finetune/job/cache.py), with the real
scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.machine_fixture import SET, CloudMachine, begin_run, lay_out_set, rent, sha256


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    return rent(tmp_path)


def sets_in(machine: CloudMachine) -> list[Path]:
    return sorted(path for path in (machine.bucket / "data").glob("shop-*"))


def keep_set_of_a_run(machine: CloudMachine) -> str:
    """A set in the bucket as the first attempt of a run left it. Returns the SHA-256 of its manifest."""
    lay_out_set(machine.bucket / "data" / "new", "of the run")
    sha = sha256(machine.bucket / "data" / "new" / "manifest.json")
    (machine.bucket / "data" / "new").rename(machine.bucket / "data" / f"shop-{sha[:12]}")
    return sha


def test_uploaded_data_are_used_and_saved_for_the_next_machine(machine: CloudMachine, tmp_path: Path) -> None:
    lay_out_set(machine.checkout / SET, "on the laptop")
    machine.run("train.sh")
    assert not machine.called("data")
    (kept,) = sets_in(machine)
    assert kept.name == f"shop-{sha256(kept / 'manifest.json')[:12]}"
    assert (kept / "databases/shop/shop.sqlite").read_text() == "on the laptop"
    second = rent(tmp_path / "second")
    second.env["FINETUNE_MOUNT"] = str(machine.bucket)
    code, said = second.run("train.sh", RUN_NAME="other")
    assert code == 0, said
    assert not second.called("data")
    assert (second.checkout / SET / "manifest.json").read_text() == '{"made": "on the laptop"}'
    assert (second.checkout / SET / "databases/shop/shop.sqlite").read_text() == "on the laptop"


def test_missing_data_are_prepared_and_saved(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", OVERRIDES="data.seed=3")
    assert code == 0, said
    assert machine.called("data") == ["data prepare config.yaml data.seed=3"]
    assert (machine.checkout / "data/was-built").exists(), "the config names data/built"
    (kept,) = sets_in(machine)
    assert (kept / "train.jsonl").exists()


def test_data_of_another_config_are_not_used(machine: CloudMachine, tmp_path: Path) -> None:
    machine.run("train.sh")
    second = rent(tmp_path / "second")
    second.env["FINETUNE_MOUNT"] = str(machine.bucket)
    second.run("train.sh", RUN_NAME="other", OVERRIDES="data.max_train_records=5")
    assert second.called("data") == ["data prepare config.yaml data.max_train_records=5"]


def test_what_an_earlier_job_left_here_is_not_used_for_another_config(machine: CloudMachine, tmp_path: Path) -> None:
    machine.run("train.sh")
    machine.run("train.sh", RUN_NAME="again")
    assert len(machine.called("data")) == 1
    machine.run("train.sh", RUN_NAME="other", OVERRIDES="data.seed=2")
    assert machine.called("data")[1:] == ["data prepare config.yaml data.seed=2"]
    second = rent(tmp_path / "second")
    second.env["FINETUNE_MOUNT"] = str(machine.bucket)
    second.run("train.sh")
    second.run("train.sh", RUN_NAME="other", OVERRIDES="data.seed=3")
    assert second.called("data") == ["data prepare config.yaml data.seed=3"]


def test_a_partial_copy_in_the_bucket_is_not_used(machine: CloudMachine, tmp_path: Path) -> None:
    lay_out_set(machine.checkout / SET, "on the laptop")
    machine.run("train.sh")
    (kept,) = sets_in(machine)
    (kept / "manifest.json").unlink()
    (kept / "databases" / "shop" / "shop.sqlite").write_text("hal")
    second = rent(tmp_path / "second")
    second.env["FINETUNE_MOUNT"] = str(machine.bucket)
    second.run("train.sh", RUN_NAME="second")
    assert second.called("data prepare"), "the laptop's are not whole there"
    machine.run("train.sh", RUN_NAME="third")
    assert (kept / "manifest.json").exists()
    assert (kept / "databases/shop/shop.sqlite").read_text() == "on the laptop"


def test_an_interrupted_copy_is_not_used(machine: CloudMachine) -> None:
    sha = keep_set_of_a_run(machine)
    lay_out_set(machine.checkout / SET, "prepared again since")
    begin_run(machine, "interrupted", data={"manifest_sha256": sha})
    database = machine.bucket / "data" / f"shop-{sha[:12]}" / "databases/shop/shop.sqlite"
    database.unlink()
    database.symlink_to("what the bucket does not give")
    code, said = machine.run("train.sh")
    assert code == 1 and len(said.splitlines()) == 2, said
    assert "shop.sqlite" in said
    assert not (machine.checkout / SET / "manifest.json").exists()
    assert not machine.called("train")


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_a_run_gets_its_own_data_though_others_were_uploaded(machine: CloudMachine, script: str) -> None:
    sha = keep_set_of_a_run(machine)
    lay_out_set(machine.checkout / SET, "prepared again since")
    begin_run(machine, "interrupted", data={"manifest_sha256": sha})
    code, said = machine.run(script)
    assert code == 0, said
    assert (machine.checkout / SET / "train.jsonl").read_text() == "of the run"
    assert (machine.bucket / "data" / f"shop-{sha[:12]}" / "train.jsonl").read_text() == "of the run"
