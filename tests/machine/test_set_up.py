"""The log of a machine's set-up: each part ends with a line, a run takes it once, and only an unbroken start counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.machine import set_up

LINES = """\
62.100 boot
= packages_from bucket
= packages_bytes 3300000000
95.400 packages
101.000 gpu_check
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which set-up has written its lines; it is 110 s old, and ages by 10 s with each look at the clock."""
    (tmp_path / ".finetune").mkdir()
    (tmp_path / set_up.LOG).write_text(LINES, encoding="utf-8")
    ages = iter(range(110, 1000, 10))
    monkeypatch.setattr(set_up, "machine_age", lambda: float(next(ages)))
    return tmp_path


def test_parts_add_up_to_the_age_at_the_first_step(home: Path) -> None:
    set_up.begin_job(home)
    set_up.note(set_up.MODEL_FROM, set_up.BUCKET, home)
    for part in (set_up.DATA, set_up.WEIGHTS, set_up.STEP):
        set_up.mark(part, home)
    taken = set_up.take("some/model", home)
    assert taken is not None
    assert taken.parts == {
        "boot": 62.1, "packages": 33.3, "gpu_check": 5.6, "job_start": 9.0, "data": 10.0, "weights": 10.0, "first_step": 10.0
    }  # fmt: skip
    assert taken.seconds == pytest.approx(140.0)
    assert taken.warm and taken.facts["model"] == "some/model" and taken.facts["packages_bytes"] == "3300000000"
    assert taken.text.startswith("140 s from the boot to the first step (measured): boot 62, packages 33,")
    assert set_up.from_line(json.loads((home / set_up.DONE).read_text())) == taken


def test_a_second_run_on_the_machine_is_not_counted(home: Path) -> None:
    set_up.begin_job(home)
    assert set_up.take("m", home) is not None
    set_up.begin_job(home)
    assert not (home / set_up.DONE).exists(), "the first step of this job is not done"
    set_up.mark(set_up.STEP, home)
    assert set_up.take("m", home) is None
    assert json.loads((home / set_up.DONE).read_text())["parts"] == {}, "but it says that the step is done"


def test_a_job_after_one_that_came_to_no_step_is_not_counted(home: Path) -> None:
    set_up.begin_job(home)
    set_up.begin_job(home)
    assert set_up.read(home) is None


def test_without_a_log_nothing_is_written(tmp_path: Path) -> None:
    set_up.begin_job(tmp_path)
    set_up.mark(set_up.STEP, tmp_path)
    assert set_up.take("m", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["62.1 boot\n50.0 packages\n", "62.1 boot\nnan packages\n", "62.1\n", "\0\n", "1e5 boot\n"]
)
def test_a_damaged_log_is_none(text: str, home: Path) -> None:
    (home / set_up.LOG).write_text(text, encoding="utf-8")
    assert set_up.read(home) is None


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"parts": {}, "facts": {}},
        {"parts": {"boot": -1.0}, "facts": {}},
        {"parts": {"boot": float("nan")}, "facts": {}},
        {"parts": {"boot": True}, "facts": {}},
        {"parts": {"boot": 1e9}, "facts": {}},
        {"parts": [1], "facts": {}},
        {"parts": {"boot": 1.0}},
    ],
)
def test_a_damaged_line_of_a_ledger_is_none(line: dict[str, Any]) -> None:
    assert set_up.from_line(line) is None


@pytest.mark.parametrize(
    ("facts", "warm"),
    [
        ({"packages_from": "bucket", "model_from": "bucket"}, True),
        ({"packages_from": "here", "model_from": "here"}, True),
        ({"packages_from": "index", "model_from": "bucket"}, False),
        ({"packages_from": "bucket", "model_from": "hub"}, False),
    ],
)
def test_a_launch_is_warm_if_nothing_came_from_the_index_or_the_hub(facts: dict[str, str], warm: bool) -> None:
    assert set_up.SetUp({"boot": 1.0}, facts).warm is warm


def test_each_model_has_a_file_of_its_own() -> None:
    names = [
        set_up.record_name(name) for name in ("mistralai/Mistral-7B-v0.1", "mistralai-Mistral-7B-v0.1", "../x", "é")
    ]
    assert len(set(names)) == 4
    assert names[0].startswith("mistralai-mistral-7b-v0-1-")
    assert all("/" not in name and not name.startswith(".") for name in names)
