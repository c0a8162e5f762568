"""Whole runs on the fused backend, on a CPU in float32: the Hugging Face losses for 200 steps, and an adapter that
loads anywhere."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.train_helpers import adapter_of, at_step, record_of

torch = pytest.importorskip("torch")

from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from finetune.cli.main import main  # noqa: E402
from finetune.config.schema import LoraSection, ModelSection, QuantizationSection  # noqa: E402
from finetune.data.prompts import PromptTemplate  # noqa: E402
from finetune.data.records import read_records  # noqa: E402
from finetune.data.tokenize import Examples, tokenise  # noqa: E402
from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.models.load import attach_lora, load_base, load_tokenizer  # noqa: E402
from finetune.training.step.runner import FusedBackend  # noqa: E402
from tests.helpers.fused_examples import ON_CPU, adapters, hf_loss, labelled, losses, trainer_for  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelSection(name=str(tiny_model)))


@pytest.fixture(scope="module")
def examples(tiny_data: Path, tokenizer: Any) -> Examples:
    return tokenise(read_records(tiny_data / "train.jsonl"), PromptTemplate(), tokenizer, 1024)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora_model(folder: Path, dropout: float = 0.0) -> Any:
    base = load_base(ModelSection(name=str(folder)), QuantizationSection(load_in_4bit=False), ON_CPU)
    base.config.use_cache = False
    torch.manual_seed(0)
    return attach_lora(base, LoraSection(r=4, lora_dropout=dropout))


def run(folder: Path, tokenizer: Any, examples: Examples, *, dropout: float = 0.0, **changes: Any) -> Any:
    trainer = trainer_for(lora_model(folder, dropout), tokenizer, examples, **changes)
    torch.manual_seed(1)
    trainer.train()
    return trainer


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between two loss histories, relative to the second."""
    assert len(ours) == len(theirs)
    return max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))


def validation_losses(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_two_hundred_steps_have_the_hf_losses(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    """Measured: 2.4e-7 apart after 200 steps. At five times this rate AdamW, which divides by what may be next to nothing, makes
    that grow to 0.9%."""
    changes = {"max_steps": 200, "eval_steps": 50, "validates": True, "learning_rate": 2e-3}
    fused = run(tiny_model, tokenizer, examples, kernels="fused", **changes)
    hf = run(tiny_model, tokenizer, examples, kernels="hf", **changes)
    assert isinstance(fused.stepper.backend, FusedBackend)
    assert not isinstance(hf.stepper.backend, FusedBackend)
    assert len(losses(hf)) == 200
    assert losses(hf)[-1] < losses(hf)[0] - 1.0
    assert apart(losses(fused), losses(hf)) < 1e-5
    assert len(validation_losses(hf)) == 4
    assert apart(validation_losses(fused), validation_losses(hf)) < 1e-5
    theirs = adapters(hf.model)
    for name, parameter in adapters(fused.model).items():
        assert (parameter - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name


def test_the_losses_do_not_depend_on_micro_batches_nor_on_checkpointing(
    tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    def history(tokens: int, uncheckpointed: int, size: int | None = None) -> list[float]:
        plan = {"limits": MicroBatchConfig(tokens, uncheckpointed), "micro_batch_size": size}
        trainer = run(tiny_model, tokenizer, examples, kernels="fused", max_steps=8, learning_rate=2e-3, plan=plan)
        return losses(trainer)

    whole = history(100_000, 2)
    assert whole[-1] < whole[0] - 0.02
    for other in (
        history(1, 0),
        history(140, 1),
        history(100_000, 2, size=1),
        history(100_000, 1, size=3),
    ):
        assert apart(other, whole) < 1e-6


# --- through the command

FUSED = {"kernels": "fused", "learning_rate": 2e-2, "max_steps": 6, "group_by_length": False}


def plain_loss(folder: Path, adapter: Path, rows: Examples) -> float:
    """Mean negative log-likelihood (nats) of the labels, by transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            total += hf_loss(model, row.ids, row.labels).item()
            count += labelled([row.labels])
    return total / count


@pytest.mark.usefixtures("no_keys")
def test_the_adapter_of_a_fused_run_loads_with_plain_peft(
    tiny_config: Any, tiny_model: Path, tiny_data: Path, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    """The validation loss at the last step, from the fused layers, equals that of the saved adapter."""
    config = tiny_config(training=FUSED | {"eval_steps": 6}, quantization={"load_in_4bit": False})
    assert main(["train", str(config)]) == 0
    assert "fused layers (training.kernels)" in capsys.readouterr().err
    saved = tmp_path / "runs" / "tiny-001"
    [found] = [row["eval_loss"] for row in record_of(saved)["history"] if row.get("eval_loss")]
    rows = tokenise(read_records(tiny_data / "val.jsonl"), PromptTemplate(), tokenizer, 1024)
    assert len(rows) == 6
    assert plain_loss(tiny_model, saved / "adapter", rows) == pytest.approx(found, rel=1e-5)


@pytest.mark.usefixtures("no_keys")
def test_a_fused_run_with_dropout_that_was_interrupted_ends_in_the_same_bytes(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the first epoch of 6 steps; the ninth step is in the second."""
    training = FUSED | {"max_steps": 9}
    sections = {"lora": {"lora_dropout": 0.2}, "quantization": {"load_in_4bit": False}}
    assert main(["train", str(tiny_config(training=training, **sections))]) == 0
    with monkeypatch.context() as patch:
        at_step(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert main(["train", str(tiny_config(training=training, **sections))]) == 75
    second = tmp_path / "runs" / "tiny-002"
    assert record_of(second)["steps"]["done"] == 4
    assert main(["train", "--resume", str(second)]) == 0
    assert adapter_of(second) == adapter_of(tmp_path / "runs" / "tiny-001")
