"""`finetune train --stop-after-step`: a run that pauses and goes on is the run that did not pause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.errors import raises
from tests.helpers.train_helpers import adapter_of, change, check_agrees, record_of

torch = pytest.importorskip("torch")

from finetune.cli.main import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
TRAINING = {"max_steps": 6, "eval_steps": 4}
LORA = {"lora_dropout": 0.2}


@pytest.fixture(scope="module")
def plain(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert main(["train", str(write_config(folder, training=TRAINING, lora=LORA))]) == 0
    return folder / "runs" / "tiny-001"


@pytest.fixture
def paused(tiny_config: ConfigWriter, tmp_path: Path) -> Path:
    """Paused after step 3, which is neither a step of a checkpoint nor one of a validation loss."""
    assert main(["train", str(tiny_config(training=TRAINING, lora=LORA)), "--stop-after-step", "3"]) == 0
    return tmp_path / "runs" / "tiny-001"


def validated(run: Path) -> list[int]:
    return [row["step"] for row in record_of(run)["history"] if "eval_loss" in row]


def test_it_pauses_with_a_validation_loss_a_checkpoint_and_an_adapter(paused: Path) -> None:
    record = check_agrees(paused)
    assert record["status"] == "paused" and record["steps"] == {"done": 3, "planned": 6}
    assert record["adapter_step"] == 3 and adapter_of(paused)
    assert validated(paused) == [3]
    assert [json.loads(line) for line in (paused / "ledger/attempt-001.jsonl").read_text().splitlines()][-1][
        "reason"
    ] == "paused"


def test_it_goes_on_to_what_a_run_without_a_pause_becomes(plain: Path, paused: Path) -> None:
    assert main(["train", "--resume", str(paused), "--stop-after-step", "5"]) == 0
    assert record_of(paused)["status"] == "paused"
    assert main(["train", "--resume", str(paused), "--stop-after-step", "99"]) == 0
    record = check_agrees(paused)
    assert (record["status"], record["attempts"]) == ("done", 3)
    assert validated(paused) == [3, 4, 5, 6] and validated(plain) == [4, 6]
    assert adapter_of(paused) == adapter_of(plain)
    losses = [{r["step"]: r["loss"] for r in record_of(run)["history"] if "loss" in r} for run in (plain, paused)]
    assert losses[0] == losses[1]


def test_a_run_that_is_there_already_loads_nothing(paused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between the checkpoint and the end of the attempt."""
    from finetune.training import run

    before = adapter_of(paused), record_of(paused)["history"]
    record = record_of(paused) | {"status": "running", "history": [], "adapter_step": None}
    (paused / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(run, "load_parts", lambda inputs: pytest.fail("the model is loaded"))
    assert main(["train", "--resume", str(paused), "--stop-after-step", "3"]) == 0
    assert (adapter_of(paused), record_of(paused)["history"]) == before
    assert (record_of(paused)["status"], record_of(paused)["attempts"]) == ("paused", 2)


def test_without_validation_it_pauses_all_the_same(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    config = tiny_config(training={**TRAINING, "eval_steps": 0})
    assert main(["train", str(config), "--stop-after-step", "1"]) == 0
    assert record_of(tmp_path / "runs" / "tiny-001")["steps"]["done"] == 1
    change(config, "training", run_name="other")
    assert validated(tmp_path / "runs" / "tiny-001") == []


@pytest.mark.parametrize("step", ["0", "-1", "1.5", "x", "1" * 13])
def test_a_step_that_cannot_be(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "configs/demo_cpu.yaml", f"--stop-after-step={step}"])
    assert "--stop-after-step: expected a whole number above 0" in capsys.readouterr().err


def test_a_done_run_does_not_pause(plain: Path) -> None:
    from finetune.run_folder import open_run
    from finetune.training.run import resume

    with raises("run.done"):
        resume(open_run(plain), stop_step=3)
