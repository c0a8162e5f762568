"""The first optimizer step on a machine puts the parts of its set-up into the ledger, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.budget.ledger import Ledger
from finetune.machine import set_up

pytest.importorskip("torch")

from finetune.cli.main import main

pytestmark = pytest.mark.usefixtures("no_keys")


def test_the_first_run_on_a_machine_records_its_set_up_and_the_second_does_not(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ages = iter(range(200, 10_000))
    monkeypatch.setattr(set_up, "machine_age", lambda: float(next(ages)))
    log = tmp_path / "home" / set_up.LOG
    log.parent.mkdir(parents=True)
    log.write_text("60.0 boot\n= packages_from bucket\n90.0 packages\n199.5 model_files\n", encoding="utf-8")
    config = str(tiny_config())
    assert main(["train", config]) == 0
    folders = sorted((tmp_path / "runs").iterdir())
    (attempt,) = Ledger(folders[0] / "ledger").account().attempts
    assert attempt.set_up is not None
    assert list(attempt.set_up.parts) == [
        "boot", "packages", "model_files", "imports", "checks", "examples", "weights", "first_step"
    ]  # fmt: skip
    assert attempt.set_up.seconds == 204.0, "the clock at the end of the first step"
    assert attempt.set_up.facts["packages_from"] == "bucket"
    name = json.loads((folders[0] / "run.json").read_text())["config"]["model"]["name"]
    assert attempt.set_up.facts["model"] == name
    lines = [json.loads(line) for line in (folders[0] / "ledger" / "attempt-001.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events.count("set_up") == 1 and events.index("set_up") < events.index("end")
    assert main(["train", config]) == 0
    (second,) = Ledger(sorted((tmp_path / "runs").iterdir())[1] / "ledger").account().attempts
    assert second.set_up is None
