"""A job's environment: its settings, and one line for every invalid one."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from finetune.job.dev import _link
from finetune.job.evaluate import run_to_score
from finetune.job.settings import SECRETS, Nodes, read_settings
from finetune.job.train import _begin
from finetune.run_folder import RunFolder
from tests.helpers.errors import raises

GIVEN = {"HOME": "/home/me", "RUN_NAME": "run", "CONFIG": "configs/a.yaml", "MAX_RUN_USD": "7.5", "MAX_HOURS": "3"}
NODES = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}


def test_settings_are_read_and_shown_as_they_were_typed() -> None:
    settings = read_settings(GIVEN | {"OVERRIDES": " lora.r=4  training.seed=1 ", "BUCKET": ""})
    assert (settings.config, settings.overrides) == ("configs/a.yaml", ["lora.r=4", "training.seed=1"])
    assert (settings.limits, settings.bucket) == ("MAX_HOURS=3, MAX_RUN_USD=7.5", "BUCKET")
    assert (settings.state, settings.runs) == (Path("/home/me/.finetune"), Path("/bucket/runs"))


def test_missing_and_empty_variables_have_defaults() -> None:
    settings = read_settings({"MAX_HOURS": "", "HOME": "/home/me"})
    assert (settings.max_run_usd, settings.max_hours, settings.grace_seconds) == tuple(map(Decimal, (25, 24, 180)))
    assert settings.environment["GRACE_SECONDS"] == "180", "finetune.runtime.torchrun reads it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("MAX_RUN_USD", "MAX_HOURS", "GRACE_SECONDS") for value in ("0", "1e3", "-1", "٣")),
        ("RUN_NAME", "run\n"),
        ("RUN_NAME", "a/b"),
        ("RUN_NAME", "base"),
        ("RUN_NAME", "Base"),
        ("RUN_NAME", ".a"),
        ("RUN_NAME", "-a"),
        ("RUN_NAME", "a\nb"),
    ],
)
def test_an_invalid_value_is_named_in_one_line(name: str, value: str) -> None:
    with raises("job.bad_setting") as raised:
        read_settings(GIVEN | {name: value})
    said = str(raised.value)
    assert said.startswith(f"{name}: expected ") and repr(value) in said
    assert len(said.splitlines()) == 1


def test_a_long_name_is_refused_and_not_shown_whole() -> None:
    with raises("job.bad_setting", match="^RUN_NAME: expected at most 100 of") as raised:
        read_settings(GIVEN | {"RUN_NAME": "a" * 5000})
    assert len(str(raised.value)) < 300


def test_a_task_id_that_cannot_name_a_run_is_refused() -> None:
    settings = read_settings(
        {name: value for name, value in GIVEN.items() if name != "RUN_NAME"} | {"SKYPILOT_TASK_ID": "BASE"}
    )
    with raises("job.bad_setting", match="SKYPILOT_TASK_ID: cannot name the run: .*set RUN_NAME"):
        settings.name_of_run()


def test_all_wrong_values_are_named_at_once() -> None:
    with raises("job.bad_setting", match=r"MAX_RUN_USD: .*; MAX_HOURS: .*; RUN_NAME: "):
        read_settings({"MAX_RUN_USD": "all", "MAX_HOURS": "no", "RUN_NAME": "../up"})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"SKYPILOT_NUM_NODES": "two"}, "SKYPILOT_NUM_NODES"),
        ({"SKYPILOT_NODE_RANK": "first"}, "SKYPILOT_NODE_RANK"),
        ({"SKYPILOT_NODE_IPS": ""}, "SKYPILOT_NODE_IPS"),
    ],
)
def test_nodes_that_cannot_find_each_other_are_refused(changed: dict[str, str], named: str) -> None:
    assert read_settings(GIVEN | NODES).nodes == Nodes(2, 1, "10.0.0.4")
    assert read_settings(GIVEN | NODES | {"SKYPILOT_NUM_NODES": "1"}).nodes is None
    with raises("job.bad_setting", match=f"^{named}: "):
        read_settings(GIVEN | NODES | changed)


def test_missing_required_settings_are_named(tmp_path: Path) -> None:
    settings = read_settings({"HOME": str(tmp_path), "FINETUNE_MOUNT": str(tmp_path / "bucket")})
    with raises("job.missing_setting", match="^RUN_NAME: empty"):
        settings.name_of_run()
    with raises("bucket.not_mounted", match="bucket: no bucket is mounted there"):
        settings.require_bucket()
    with raises("job.missing_setting", match="^CONFIG: expected a config file"):
        _begin(RunFolder(tmp_path / "run"), settings)


def test_a_bucket_without_the_run_to_score_is_refused(tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path), "FINETUNE_MOUNT": str(tmp_path), "SKYPILOT_TASK_ID": "job"}
    with raises("run.none_trained", match="runs: no trained run found"):
        run_to_score(read_settings(given))
    with raises("run.not_found", match="runs/mine: no such run; found: nothing"):
        run_to_score(read_settings(given | {"RUN_NAME": "mine"}))


def test_empty_secrets_do_not_reach_the_programs() -> None:
    seen = read_settings(GIVEN | {"WANDB_API_KEY": "", "HF_TOKEN": "mine", "EMPTY": ""}).environment
    assert "WANDB_API_KEY" not in seen
    assert (seen["HF_TOKEN"], seen["EMPTY"]) == ("mine", "")
    assert not set(SECRETS) - {"HF_TOKEN"} & set(read_settings(GIVEN | dict.fromkeys(SECRETS, "")).environment)


@pytest.mark.parametrize("info", ["", "{torn", "[]", '{"cluster_name": null}'])
def test_a_cluster_without_a_name_is_accepted(info: str) -> None:
    assert read_settings(GIVEN | {"SKYPILOT_CLUSTER_INFO": info}).cluster == "CLUSTER"


def test_a_users_folder_is_not_replaced_by_the_link_to_the_bucket(tmp_path: Path) -> None:
    mine, bucket = tmp_path / "notebooks", tmp_path / "bucket"
    mine.mkdir()
    with raises("job.name_taken", match="notebooks"):
        _link(mine, bucket)
    mine.rmdir()
    for _ in range(2):
        _link(mine, bucket)
    assert mine.resolve() == bucket
