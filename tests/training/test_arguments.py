"""The effect of each key of the training section on the trainer, and that the libraries print nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

torch = pytest.importorskip("torch")

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection, TrainingSection  # noqa: E402
from finetune.data.prompts import PromptTemplate  # noqa: E402
from finetune.data.records import read_records  # noqa: E402
from finetune.data.tokenize import Examples, tokenise  # noqa: E402
from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.models.load import attach_lora, load_base, load_tokenizer  # noqa: E402
from finetune.training.arguments import trainer_arguments  # noqa: E402
from finetune.training.step.plan import StepPlan  # noqa: E402
from finetune.training.trainer import AnswerTrainer  # noqa: E402
from tests.helpers.fused_examples import ON_CPU as CPU  # noqa: E402
from tests.helpers.fused_examples import adapters, section, trainer_for  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelSection(name=str(tiny_model)))


@pytest.fixture(scope="module")
def examples(tiny_data: Path, tokenizer: Any) -> Examples:
    return tokenise(read_records(tiny_data / "train.jsonl"), PromptTemplate(), tokenizer, 1024)


@pytest.fixture(autouse=True)
def quiet_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora_model(folder: Path, *, nf4: bool = True) -> Any:
    base = load_base(ModelSection(name=str(folder)), QuantizationSection(load_in_4bit=nf4), CPU)
    base.config.use_cache = False
    torch.manual_seed(0)
    return attach_lora(base, LoraSection(r=4, lora_dropout=0.0))


def adapter(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in adapters(model).items()}


def arguments(training: TrainingSection, *, validates: bool = False) -> Any:
    plan = StepPlan(
        "hf", 16, None, MicroBatchConfig(2048, 0), training.gradient_checkpointing is True, None, "on a CPU"
    )
    return trainer_arguments(training, CPU, plan, checkpoints=Path("out"), run_name="run", validates=validates)


def another_value(hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        return next(option for option in get_args(hint) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2 if value >= 0 else 7
    return value + 0.25


OURS_TO_THEIRS: dict[str, str] = {"warmup_ratio": "warmup_steps"}
NAMES_THE_FOLDER = {"output_dir", "run_name"}  # runs.create_run reads these
NAMES_THE_LOSS = {"objective"}  # setup and trainer read it; tests/training/objectives/
MAKE_THE_PLAN = {  # step_plan reads these; tests/training/step/test_plan.py
    "effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "max_memory_gib", "kernels",
    "group_by_length",
}  # fmt: skip


@pytest.mark.parametrize(
    "key", sorted({f.name for f in fields(TrainingSection)} - NAMES_THE_FOLDER - NAMES_THE_LOSS - MAKE_THE_PLAN)
)
@pytest.mark.parametrize("which", ["default", "changed"])
def test_every_other_training_key_reaches_the_library(key: str, which: str) -> None:
    value = getattr(section(), key)
    if which == "changed":
        value = another_value(get_type_hints(TrainingSection)[key], value)
    found = arguments(section(**{key: value}), validates=True).to_dict()[OURS_TO_THEIRS.get(key, key)]
    assert found == value


def test_to_the_library_a_batch_is_a_whole_step(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    made = arguments(section(per_device_train_batch_size=4, gradient_accumulation_steps=4))
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (16, 1)
    trainer = trainer_for(
        lora_model(tiny_model), tokenizer, examples, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    assert trainer.args.per_device_train_batch_size == 6
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.epoch == 3 * 6 / 24
    assert trainer.state.num_input_tokens_seen == sum(
        batch["step"].tokens for batch, _ in zip(trainer.get_train_dataloader(), range(3), strict=False)
    )


@pytest.mark.parametrize("kernels", ["fused", "hf"])
def test_gradients_are_clipped_over_all_adapters(
    kernels: str, tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    """A norm far below AdamW's epsilon stops learning; the logged norm is that of all adapters before clipping."""
    trainer = trainer_for(
        lora_model(tiny_model, nf4=False), tokenizer, examples, kernels=kernels, max_steps=1, max_grad_norm=1e-12
    )
    before, norms = adapter(trainer.model), []
    original = trainer.training_step

    def watched(*given: Any, **named: Any) -> Any:
        loss = original(*given, **named)
        norms.append(float(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.requires_grad]).norm()))
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    logged = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    assert norms == [pytest.approx(logged, rel=1e-5)]
    moved = max(float((weight - before[name]).abs().max()) for name, weight in adapter(trainer.model).items())
    assert 0 < moved < 1e-5 < 1e-2, "unclipped, AdamW's first step is as long as the learning rate"


def test_run_folder_and_validation_reach_the_library_which_neither_saves_nor_reports_on_its_own() -> None:
    plan = StepPlan("hf", 16, None, MicroBatchConfig(2048, 0), False, None, "on a CPU")
    made = trainer_arguments(section(), CPU, plan, checkpoints=Path("here"), run_name="me", validates=True)
    assert (made.output_dir, made.run_name, made.save_strategy) == ("here", "me", "no")
    assert made.report_to == []
    assert made.eval_strategy == "steps"
    assert arguments(section()).eval_strategy == "no"


@pytest.mark.parametrize(("ratio", "steps", "warm"), [(0.1, 40, 4), (0.03, 100, 3), (0.05, 30, 2), (0.0, 40, 0)])
def test_the_warmup_ratio_is_a_share_of_all_steps(
    ratio: float, steps: int, warm: int, tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples, warmup_ratio=ratio, max_steps=steps)
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[: warm + 1] == pytest.approx([1e-2 * i / max(warm, 1) for i in range(warm)] + [1e-2])
    assert all(late < 1e-2 for late in rates[warm + 1 :])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)


def test_the_libraries_print_nothing_on_their_own(
    tiny_model: Path, tokenizer: Any, examples: Examples, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples, max_steps=1)
    assert isinstance(trainer, AnswerTrainer)
    capfd.readouterr()
    trainer.train()
    assert capfd.readouterr().out == ""
