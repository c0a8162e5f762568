"""How a run handles memory and losses that are not finite, and what run.json records of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.train_helpers import adapter_of, at_step, record_of

torch = pytest.importorskip("torch")

from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.config.validate import LARGEST  # noqa: E402
from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.estimate.memory_hf import MemoryEstimate  # noqa: E402
from finetune.machine.hardware import GIB, DetectedGpu, Hardware  # noqa: E402
from finetune.models.device import Device  # noqa: E402
from finetune.run_record import RunRecord, read_record, write_record  # noqa: E402
from finetune.training import run as training_run  # noqa: E402
from finetune.training.record import measurements  # noqa: E402
from finetune.training.step.plan import StepPlan, worst_micro_batch  # noqa: E402
from finetune.training.trainer import build_trainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]

AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": None, "effective_batch_size": 6}


# --- the largest micro-batch


@pytest.mark.parametrize(
    ("lengths", "limits", "rows", "batch_size", "padded", "expected"),
    [
        ([5, 9, 7, 2, 1], MicroBatchConfig(16, 0), None, 8, False, [1, 2]),  # 9 + 7
        ([5, 9, 7, 2, 1], MicroBatchConfig(15, 0), None, 8, False, [1, 0, 4]),  # 9 + 5 + 1: neither 7 nor 2 has room
        ([5, 9, 7, 2, 1], MicroBatchConfig(99, 0), None, 3, False, [1, 2, 0]),  # a step has no more examples
        ([5, 9, 7, 2, 1], MicroBatchConfig(27, 0), None, 8, True, [1, 2, 0]),  # three rows of 9
        ([5, 9, 7, 2, 1], MicroBatchConfig(99, 0), None, 2, True, [1, 2]),
        ([5, 9, 7, 2, 1], MicroBatchConfig(4, 0), None, 8, True, [1]),  # the longest has to fit in any case
        ([5, 9, 7, 2, 1], MicroBatchConfig(4, 0), None, 8, False, [1]),
        (
            [5, 9, 7, 2, 1],
            MicroBatchConfig(1, 0),
            3,
            8,
            False,
            [1, 2, 0],
        ),  # a fixed number from the config, whatever its size
        ([5, 9, 7, 2, 1], MicroBatchConfig(1, 0), 9, 4, True, [1, 2, 0, 3]),
    ],
)
def test_the_largest_micro_batch_is_of_the_longest_examples(
    lengths: list[int], limits: MicroBatchConfig, rows: int | None, batch_size: int, padded: bool, expected: list[int]
) -> None:
    assert worst_micro_batch(lengths, limits, rows, batch_size=batch_size, padded=padded) == expected


@pytest.mark.parametrize(
    "sections", [{"training": AUTO}, {"training": AUTO | {"kernels": "fused"}, "quantization": {"load_in_4bit": False}}]
)
def test_a_memory_dry_run_does_not_change_what_is_learned(
    sections: dict[str, Any], tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**sections, lora={"lora_dropout": 0.3})
    assert main(["train", str(config)]) == 0
    dry_runs: list[int] = []
    memory_dry_run = training_run.memory_dry_run

    def watched(trainer: Any, plan: StepPlan, examples: Any) -> None:
        run = trainer.stepper.memory_dry_run

        def noted(worst: Any) -> None:
            dry_runs.extend(len(example) for example in worst)
            run(worst)

        trainer.stepper.memory_dry_run = noted
        memory_dry_run(trainer, plan, examples)

    monkeypatch.setattr(training_run, "memory_dry_run", watched)
    monkeypatch.setattr(training_run, "needs_memory_dry_run", lambda device: True)
    assert main(["train", str(config)]) == 0
    one, other = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert len(dry_runs) == 6
    assert dry_runs == sorted(dry_runs, reverse=True)
    assert adapter_of(one) == adapter_of(other)


# --- run.json


def test_the_record_describes_how_a_step_is_computed(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    config = tiny_config(training=AUTO | {"max_steps": 1, "kernels": "fused"}, quantization={"load_in_4bit": False})
    assert main(["train", str(config)]) == 0
    assert main(["train", str(tiny_config(training={"max_steps": 1, "per_device_train_batch_size": 3}))]) == 0
    fused, hf = (record_of(tmp_path / "runs" / f"tiny-00{n}") for n in (1, 2))
    assert fused["step"] == {
        "backend": "fused", "why": "training.kernels", "batch_size": 6, "ranks": 1, "micro_batch_tokens": 2048,
        "micro_batch_size": None,
        "uncheckpointed_layers": 2, "dequantized_layers": 2, "checkpointing": False, "out_of_memory": 0, "bad_steps": 0,
    }  # fmt: skip
    expected = {"backend": "hf", "batch_size": 3, "micro_batch_size": 3}
    expected |= {"uncheckpointed_layers": None, "dequantized_layers": None}
    assert {key: hf["step"][key] for key in expected} == expected
    if not torch.cuda.is_available():
        assert fused["memory"] is hf["memory"] is None


def test_the_record_follows_the_steppers_oom_fallback() -> None:
    plan = StepPlan("fused", 16, 4, MicroBatchConfig(4096, 32, 8), False, None, "asked")
    stepper: Any = SimpleNamespace(
        limits=MicroBatchConfig(2048, 32, 8), micro_batch_size=None, out_of_memory=1, watch=SimpleNamespace(bad_steps=3)
    )
    found = measurements.describe_step(plan, stepper)
    assert (found.micro_batch_tokens, found.micro_batch_size, found.out_of_memory, found.bad_steps) == (
        2048,
        None,
        1,
        3,
    )


def test_on_a_gpu_estimate_and_measurement_are_both_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10 * GIB)
    needed = MemoryEstimate(0, 0, 0, 0, 0, 0, 0, peak=8 * GIB, reserve=GIB // 2)
    found = measurements.describe_memory(StepPlan("fused", 16, None, MicroBatchConfig(4096, 32), False, needed, ""))
    assert found is not None
    assert list(vars(found).values())[:4] == [8.0, 8.5, 9.0, 10.0]
    assert found.basis and "estimated" in found.basis and "measured" in found.basis
    unknown = measurements.describe_memory(StepPlan("hf", 16, None, MicroBatchConfig(4096, 0), True, None, ""))
    assert unknown is not None and list(vars(unknown).values())[:4] == [None, None, 9.0, 10.0]


def test_the_gpu_of_a_run_is_recorded_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DetectedGpu("NVIDIA L4", 22.0, (8, 9), count=2)
    monkeypatch.setattr(measurements, "detect", lambda: Hardware("Linux", "EPYC", 2, 24.0, gpu, "float16"))
    record = RunRecord()
    record.hardware = measurements.describe_hardware(Device(torch.device("cpu"), torch.bfloat16))
    write_record(tmp_path / "run.json", record)
    found = read_record(tmp_path / "run.json").hardware
    assert found and found.gpu and found.dtype == "bfloat16"
    assert (found.gpu.name, found.gpu.compute_capability, found.gpu.count) == ("NVIDIA L4", [8, 9], 2)


# --- losses that are not finite


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_values_that_are_not_finite_end_the_run_without_a_corrupt_checkpoint(
    max_grad_norm: float, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters scaled by 1e37 change nothing before their first update, whose gradient is infinite. With clipping it would become
    zero and the run would finish without learning; without, it corrupts the adapters and, one step later, the loss."""
    monkeypatch.setitem(LARGEST, "lora.lora_alpha", 10**39)
    training = {"max_grad_norm": max_grad_norm, "max_steps": 9}
    config = tiny_config(training=training, lora={"lora_alpha": 10**38}, checkpoint={"save_steps": 1})
    with reported("training.not_finite"):
        assert main(["train", str(config)]) == 2
    [ours] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune: ")]
    assert "the gradient" in ours
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "failed"
    for folder in checkpoint_folders.newest_first(run / "checkpoints"):
        assert checkpoint_folders.fault(folder) is None
        assert all(bool(torch.isfinite(value).all()) for value in adapter_values(folder))
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    assert not (run / "adapter").exists()


def test_the_checkpoint_before_the_fault_is_kept(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    """An adapter has an infinite value from the start of step 4 on, as after an overflow."""
    held: list[Any] = []
    original = build_trainer

    def build(*arguments: Any, **more: Any) -> Any:
        held.append(original(*arguments, **more))
        return held[0]

    monkeypatch.setattr(training_run, "build_trainer", build)
    at_step(4, lambda: held[0].stepper.adapters.parameter.data[:9].fill_(torch.inf), monkeypatch)
    with reported("training.not_finite"):
        assert main(["train", str(tiny_config(training={"max_steps": 9}, checkpoint={"save_steps": 1}))]) == 2
    assert "the loss" in capsys.readouterr().err
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "failed"
    assert [folder.name for folder in checkpoint_folders.newest_first(run / "checkpoints")] == ["step-3", "step-2"]
    assert checkpoint_folders.fault(run / "checkpoints" / "step-3") is None


def adapter_values(folder: Path) -> list[Any]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())
