"""`tracking.to`: which trackers a config asks for, and what is said of those that cannot be used."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli.main import main
from finetune.config.load import load_config
from finetune.config.schema import TrackingSection
from finetune.run_folder import RunFolder
from finetune.training.tracking import names, results
from finetune.training.tracking.names import check_trackers, chosen, project, wandb_mode
from finetune.training.tracking.trackers import trackers
from tests.helpers.errors import raises, reported
from tests.helpers.plan_examples import run_values

pytestmark = pytest.mark.usefixtures("no_keys")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, no_keys: None) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_", "SKYPILOT_"))]:
        monkeypatch.delenv(name)


def loaded(folder: Path, **tracking: Any) -> TrackingSection:
    (folder / "run.yaml").write_text(yaml.safe_dump(run_values() | {"tracking": tracking}), encoding="utf-8")
    return load_config(folder / "run.yaml").tracking


@pytest.mark.parametrize(
    ("key", "tracking", "expected"),
    [
        (False, {}, ("tensorboard",)),
        (True, {}, ("tensorboard", "wandb")),
        (False, {"wandb": "offline"}, ("tensorboard", "wandb")),
        (True, {"wandb": "disabled"}, ("tensorboard",)),
        (True, {"to": ["mlflow", "tensorboard"]}, ("tensorboard", "mlflow")),
        (True, {"to": ["trackio", "wandb"]}, ("wandb", "trackio")),
        (True, {"to": []}, ()),
    ],
)
def test_which_trackers_are_used(
    key: bool, tracking: dict[str, Any], expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `to` as before there was such a key."""
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    section = loaded(tmp_path, **tracking)
    assert chosen(section) == expected
    assert len(trackers(section, tmp_path, "demo", None)) == len(expected)
    assert (wandb_mode(section) is not None) == ("wandb" in expected)


def test_the_project_is_that_of_wandb_unless_one_is_given(tmp_path: Path) -> None:
    assert project(loaded(tmp_path)) == "text2sql"
    assert project(loaded(tmp_path, wandb_project="mine")) == "mine"
    assert project(loaded(tmp_path, wandb_project="mine", project="ours")) == "ours"


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        ({"to": ["mlfow"]}, "tracking.to: unknown tracker 'mlfow'; known: tensorboard, wandb, mlflow, trackio"),
        ({"to": ["wandb"], "wandb": "disabled"}, "tracking.to: lists wandb, which tracking.wandb=disabled turns off"),
        ({"to": ["tensorboard"], "wandb": "online"}, "tracking.wandb: online, but tracking.to does not list wandb"),
    ],
)
def test_impossible_choices_are_refused_when_the_config_is_read(
    tracking: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with raises("config.bad_value", match=said):
        loaded(tmp_path, **tracking)


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    for name in ("mlflow", "trackio"):
        monkeypatch.setattr(names, "find_spec", lambda wanted, name=name: None if wanted == name else find_spec(wanted))
        with raises(
            "tracking.not_installed", match=rf"tracking.to: {name} is not installed; run `pip install .*\[{name}\]"
        ):
            check_trackers(TrackingSection(to=["tensorboard", name]))
    monkeypatch.undo()
    assert find_spec("mlflow") and find_spec("trackio")


def test_a_score_without_the_trackers_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a cloud machine, reported on a laptop that has the base install and a key for W&B."""
    loaded(tmp_path, wandb="auto")
    (tmp_path / "run.yaml").rename(tmp_path / "config.yaml")
    (tmp_path / "wandb-run-id").write_text("demo-1")
    (tmp_path / "report.html").write_text("")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    said: list[str] = []
    results.send_results(RunFolder(tmp_path), said.append)
    [line] = said
    assert line.startswith("W&B is not installed here (`pip install") and line.endswith(
        "; the score is not logged there"
    )


def test_mlflow_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, " "):
        if value:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        with raises("tracking.no_server", match="set MLFLOW_TRACKING_URI, such as http://127.0.0.1:5000"):
            check_trackers(TrackingSection(to=["mlflow"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_trackers(TrackingSection(to=["mlflow"]))


def test_trackio_does_not_write_to_the_disk_of_a_cloud_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(TrackingSection(to=["trackio"]))
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-1")
    with raises("tracking.no_server", match="set TRACKIO_SERVER_URL or TRACKIO_SPACE_ID"):
        check_trackers(TrackingSection(to=["trackio"]))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    check_trackers(TrackingSection(to=["trackio"]))


def test_wandb_that_is_listed_needs_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises("tracking.no_key", match=r"tracking.to: wandb needs a key; .*tracking.wandb=offline"):
        check_trackers(TrackingSection(to=["wandb"]))
    check_trackers(TrackingSection(to=["wandb"], wandb="offline"))
    check_trackers(TrackingSection())
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check_trackers(TrackingSection(to=["wandb"]))


def test_training_is_refused_before_it_costs_anything(tiny_config: Any, tmp_path: Path) -> None:
    with reported("tracking.no_server"):
        assert main(["train", str(tiny_config(tracking={"to": ["mlflow"]}))]) == 2
    assert not (tmp_path / "runs").exists()
