"""run.json is read into types and written back unchanged: absent keys stay absent, null stays null, unknown keys stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.run_record import RunRecord, SavesRecord, StepCount, read_record, write_record
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import run_record, spending


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def rewritten(path: Path) -> str:
    """The text of the file after reading and writing it back."""
    write_record(path, read_record(path))
    return path.read_text(encoding="utf-8")


LATER = {
    "status": "running",
    "energy": {"kwh": 1.5, "meters": [{"id": "a"}]},
    "steps": {"done": 3, "planned": 9, "skipped": [4]},
    "attempt_log": [{"attempt": 1, "carbon": None}],
    "hardware": {"gpu": {"name": "L4", "power": 72}},
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"status": "running"},
        run_record() | spending(),
        LATER,
        {"memory": None, "ended_at": None, "status": "done", "saves": {"count": 1}, "step": {"backend": "fused"}},
    ],
    ids=["empty", "a status", "all", "of a later version", "nulls, and sections of an earlier version"],
)
def test_a_record_that_is_read_is_written_back_unchanged(values: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, values)
    assert rewritten(path) == json.dumps(values, indent=2) + "\n"  # the order of the keys, too


def test_the_keys_of_an_earlier_version_are_understood(tmp_path: Path) -> None:
    old = {"path": "lean", "why": "x", "questions": 16, "rows": None, "kept_layers": 30, "cached_layers": 2}
    step = read_record(written(tmp_path, {"step": old})).step
    assert step and (step.backend, step.batch_size, step.micro_batch_size) == ("fused", 16, None)
    assert (step.why, step.uncheckpointed_layers, step.dequantized_layers) == ("x", 30, 2)
    reference = read_record(written(tmp_path, {"step": old | {"path": "stock"}})).step
    assert reference and reference.backend == "hf"


def test_absent_keys_have_defaults(tmp_path: Path) -> None:
    record = read_record(written(tmp_path, {"saves": {"count": 1}}))
    assert (record.status, record.attempts, record.data, record.history) == (None, 1, None, None)
    assert record.saves == SavesRecord(count=1)


def test_values_are_typed_all_the_way_down(tmp_path: Path) -> None:
    values = run_record() | spending() | {"hardware": {"gpu": {"name": "L4", "compute_capability": [8, 9]}}}
    record = read_record(written(tmp_path, values))
    assert record.steps == StepCount(240, 240) and record.wall_seconds == 503.2
    assert record.hardware and record.hardware.gpu and record.hardware.gpu.compute_capability == [8, 9]
    assert record.attempt_log and record.attempt_log[0].spot is True
    assert record.history and record.history[0]["loss"] == values["history"][0]["loss"]
    assert record.spending and record.spending.ceiling_usd == 10.0


def test_a_field_set_to_none_is_written_as_null(tmp_path: Path) -> None:
    path = written(tmp_path, LATER)
    record = read_record(path)
    record.memory = None
    assert record.steps
    record.steps.done = 4
    write_record(path, record)
    steps = LATER["steps"] | {"done": 4}  # type: ignore[operator]
    assert json.loads(path.read_text()) == LATER | {"memory": None, "steps": steps}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"status": 3}, "status: expected a text, found 3"),
        ({"attempts": "two"}, "attempts: expected a whole number, found 'two'"),
        ({"attempts": True}, "attempts: expected a whole number, found True"),
        ({"attempts": None}, "attempts: expected a whole number, found None"),
        ({"git_dirty": 1}, "git_dirty: expected true or false, found 1"),
        ({"steps": {"done": 1.5}}, "steps.done: expected a whole number, found 1.5"),
        ({"steps": {"planned": 9}}, "steps.done: missing"),
        ({"steps": [1, 9]}, "steps: expected an object"),
        ({"data": {"counts": {"train": "many"}}}, "data.counts.train: expected a whole number, found 'many'"),
        ({"history": [{"loss": 1.0}, {"loss": "low"}]}, "history[1].loss: expected a number, found 'low'"),
        ({"attempt_log": [{"hours": "long"}]}, "attempt_log[0].hours: expected a number, found 'long'"),
        ({"hardware": {"gpu": {"compute_capability": "8"}}}, "hardware.gpu.compute_capability: expected a list of whole numbers"),
    ],
)  # fmt: skip
def test_the_error_for_a_value_of_the_wrong_type_is_one_line_with_file_and_key(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, values)
    with raises("run.bad_record") as caught:
        read_record(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_new_record_writes_only_the_fields_that_were_set(tmp_path: Path) -> None:
    record = RunRecord()
    record.status, record.ended_at = "running", None
    write_record(tmp_path / "run.json", record)
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running", "ended_at": None}
