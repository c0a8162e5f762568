"""The trainer on a tiny NF4 model: which tokens have a loss, its value, and which parameters are trained."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection  # noqa: E402
from finetune.data.prompts import PromptTemplate, completion, encode_prompts  # noqa: E402
from finetune.data.records import Record, read_records  # noqa: E402
from finetune.data.tokenize import Examples, tokenise  # noqa: E402
from finetune.example import IGNORED  # noqa: E402
from finetune.models.load import attach_lora, load_base, load_tokenizer  # noqa: E402
from finetune.training import trainer as training_trainer  # noqa: E402
from finetune.training.arguments import one_gpu_a_process  # noqa: E402
from finetune.training.step.hf_backend import answer_loss  # noqa: E402
from finetune.training.tracking.trl_without_wandb import not_importable  # noqa: E402
from tests.helpers.errors import raises  # noqa: E402
from tests.helpers.fused_examples import ON_CPU as CPU  # noqa: E402
from tests.helpers.fused_examples import losses, trainer_for  # noqa: E402

TEMPLATE = PromptTemplate()
SET_FROM_OUTSIDE = r"\b(trainer|stepper)(\.\w+)+(, \w+(\.\w+)*)* = "


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelSection(name=str(tiny_model)))


@pytest.fixture(scope="module")
def records(tiny_data: Path) -> list[Record]:
    return read_records(tiny_data / "train.jsonl")


@pytest.fixture(scope="module")
def examples(records: list[Record], tokenizer: Any) -> Examples:
    return tokenise(records, TEMPLATE, tokenizer, 1024)


@pytest.fixture(autouse=True)
def quiet_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora_model(folder: Path, *, nf4: bool = True, seed: int = 0) -> Any:
    base = load_base(ModelSection(name=str(folder)), QuantizationSection(load_in_4bit=nf4), CPU)
    base.config.use_cache = False
    torch.manual_seed(seed)
    return attach_lora(base, LoraSection(r=4, lora_dropout=0.0))


def adapter(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


# --- which tokens have a loss


def test_labels_are_exactly_the_answer_and_the_end_of_text_token(
    examples: Examples, records: list[Record], tokenizer: Any
) -> None:
    assert len(examples) == len(records) == 24
    assert examples.too_long == 0
    for record, row in zip(records, examples, strict=True):
        [prompt] = encode_prompts(tokenizer, [TEMPLATE.render_record(record)])
        assert row.ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert row.labels[len(prompt) :] == row.ids[len(prompt) :]
        assert row.labels[-1] == tokenizer.eos_token_id
        assert row.targets == [*row.labels[1:], IGNORED]
        assert row.predicted == row.answer_tokens == len(row) - len(prompt)
        assert tokenizer.decode(row.labels[len(prompt) : -1]) == completion(record.sql)
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == (
            TEMPLATE.render_record(record) + completion(record.sql)
        )


def test_examples_that_are_too_long_are_dropped_and_counted_never_truncated(
    examples: Examples, records: list[Record], tokenizer: Any
) -> None:
    lengths = examples.lengths
    assert lengths == [len(example.ids) for example in examples]
    longest = max(lengths)
    assert tokenise(records, TEMPLATE, tokenizer, longest).too_long == 0
    fewer = tokenise(records, TEMPLATE, tokenizer, longest - 1)
    assert fewer.too_long == lengths.count(longest) > 0
    assert list(fewer) == [row for row in examples if len(row) < longest]
    nothing = tokenise(records, TEMPLATE, tokenizer, 16)
    assert (len(nothing), nothing.too_long) == (0, 24)


@pytest.mark.parametrize("kernels", ["fused", "hf"])
def test_an_epoch_of_steps_holds_every_example_whole_and_once(
    kernels: str, tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    trainer = trainer_for(
        lora_model(tiny_model, nf4=False), tokenizer, examples, kernels=kernels, effective_batch_size=7,
        per_device_train_batch_size=3,
    )  # fmt: skip
    steps = [batch["step"] for batch in trainer.get_train_dataloader()]
    assert [len(step.mine) for step in steps] == [7, 7, 7, 3]
    assert sorted((row.ids, row.labels) for step in steps for row in step.mine) == sorted(
        (row.ids, row.labels) for row in examples
    )
    for step in steps:
        assert step.tokens == sum(len(row) for row in step.mine)
        assert step.labelled == sum(label != IGNORED for row in step.mine for label in row.labels)


def test_padded_micro_batches_carry_no_loss_on_padding(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    trainer = trainer_for(
        lora_model(tiny_model), tokenizer, examples, effective_batch_size=8, per_device_train_batch_size=3
    )
    seen: list[Any] = []
    path: Any = trainer.stepper.backend
    original = path.batch

    def noted(rows: Any) -> Any:
        seen.append(original(rows))
        return seen[-1]

    path.batch = noted
    step = next(iter(trainer.get_train_dataloader()))["step"]
    trainer.training_step(trainer.model, {"step": step})
    assert [len(batch["input_ids"]) for batch in seen] == [3, 3, 2]
    found = []
    for batch in seen:
        assert batch["input_ids"].shape[1] % 16 == 0
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert torch.all(labels[mask == 0] == IGNORED)
            found.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
    assert sorted(found) == sorted((row.ids, row.labels) for row in step.mine)


def test_grouping_by_length_is_for_padded_batches(tiny_model: Path, tokenizer: Any, records: list[Record]) -> None:
    many = tokenise(records * 4, TEMPLATE, tokenizer, 1024)  # grouping by length needs the examples of many steps

    def padding(group: bool, kernels: str) -> int:
        model = lora_model(tiny_model, nf4=False)
        trainer = trainer_for(
            model, tokenizer, many, group_by_length=group, per_device_train_batch_size=4, kernels=kernels
        )
        steps = [[len(row) for row in batch["step"].mine] for batch in trainer.get_train_dataloader()]
        return sum(len(step) * max(step) - sum(step) for step in steps)

    assert padding(True, "hf") < 0.75 * padding(False, "hf")
    assert padding(True, "fused") == padding(False, "fused")


# --- the loss


def batch_of(examples: Examples, rows: list[int], tokenizer: Any) -> dict[str, Any]:
    """A batch padded on the right, like the trainer's collator."""
    chosen = [examples[i] for i in rows]
    width = max(map(len, chosen)) + 3

    def padded(name: str, value: int) -> Any:
        return torch.tensor([getattr(row, name) + [value] * (width - len(row)) for row in chosen])

    ids = padded("ids", tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", IGNORED)}


def gradients(model: Any) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def random_adapter_model(tiny_model: Path) -> Any:
    """Without quantisation, with an adapter that has an effect: lora_B is initialised to zero."""
    model = lora_model(tiny_model, nf4=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_the_answer_loss_is_the_hf_loss_of_the_same_labels(
    random_adapter_model: Any, examples: Examples, tokenizer: Any
) -> None:
    model, batch = random_adapter_model, batch_of(examples, [0, 1, 2, 5, 7], tokenizer)
    hf = model(**batch).loss
    hf.backward()
    expected = gradients(model)
    model.zero_grad()
    ours: Any = answer_loss(model, batch)
    ours.backward()
    torch.testing.assert_close(ours, hf, rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    labelled = int((batch["labels"] != IGNORED).sum())
    torch.testing.assert_close(answer_loss(model, batch, torch.tensor(2 * labelled)), hf / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(answer_loss(model, batch, 2 * labelled), hf / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("items", [None, 100])
def test_the_answer_loss_equals_trls(
    items: int | None, random_adapter_model: Any, examples: Examples, tokenizer: Any
) -> None:
    trainer = trainer_for(random_adapter_model, tokenizer, examples)
    batch = batch_of(examples, [0, 1, 2, 5, 7], tokenizer)
    theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
    ours = answer_loss(trainer.model, dict(batch), items)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_on_a_cpu_the_head_computes_logits_of_answers_only(
    tiny_model: Path, examples: Examples, tokenizer: Any
) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples)
    rows: list[int] = []
    head = trainer.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    batch = batch_of(examples, [0, 1, 2], tokenizer)
    trainer.stepper.backend.loss([examples[i] for i in (0, 1, 2)], 1, trainer.stepper.limits)
    assert rows == [int((batch["labels"] != IGNORED).sum())]


def test_a_batch_without_answers_has_no_loss_and_no_nan(tiny_model: Path, examples: Examples, tokenizer: Any) -> None:
    batch = batch_of(examples, [0, 1], tokenizer)
    batch["labels"][:] = IGNORED
    assert answer_loss(lora_model(tiny_model), batch).item() == 0.0


def test_a_loss_that_is_not_finite_is_detected_and_its_adapters_are_not_saved(
    tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples, max_steps=1)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    trainer.train()
    with raises("training.not_finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert [loss == loss for loss in losses(trainer)] == [False]
    assert list(Path("out").glob("*")) == []


# --- construction


def test_nothing_is_set_on_a_trainer_from_outside() -> None:
    """Everything is passed to its constructor."""
    folder = Path(training_trainer.__file__).parent
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in folder.rglob("*.py")}
    assert len(lines) > 10
    assert not [f"{path}: {line}" for path, text in lines.items() for line in text if re.search(SET_FROM_OUTSIDE, line)]
    assert re.search(SET_FROM_OUTSIDE, "    trainer.stepper.between = ends.abandon")


# --- what is trained


def test_accumulated_batches_train_like_whole_ones(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    """Batch 1 x accumulation 8 against 8 x 1 and against automatic micro-batches: the first loss, the drift over two epochs."""
    runs = []
    for size, accumulation in ((8, 1), (1, 8), ("auto", None)):
        trainer = trainer_for(
            lora_model(tiny_model), tokenizer, examples, max_steps=6,
            effective_batch_size=8, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer), adapter(trainer.model)))
    (whole, whole_adapter), *others = runs
    assert len(whole) == 6
    assert whole[-1] < whole[0] - 0.3
    for accumulated, accumulated_adapter in others:
        assert accumulated[0] == pytest.approx(whole[0], rel=1e-5)
        assert accumulated == pytest.approx(whole, rel=1e-3)
        for name, weight in whole_adapter.items():
            torch.testing.assert_close(accumulated_adapter[name], weight, rtol=0, atol=2e-3)


def test_adapters_are_float32_although_trl_casts_those_of_a_quantised_model(
    tiny_model: Path, tokenizer: Any, examples: Examples
) -> None:
    model = lora_model(tiny_model)
    assert any(hasattr(p, "quant_state") for p in model.parameters())  # NF4
    trainer = trainer_for(model, tokenizer, examples)
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all("lora_" in name for name in trainable)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == set(LoraSection().target_modules)
    assert len(trainable) == 2 * 7 * 2  # A and B on seven projections of two layers


def test_only_the_adapters_are_trained(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples)
    drawn = adapter(trainer.model)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    buffers = {name: b.detach().clone() for name, b in trainer.model.named_buffers()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(value.dtype == torch.uint8 for value in base.values())  # the packed weights are among them
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(torch.equal(dict(trainer.model.named_buffers())[name], value) for name, value in buffers.items())
    assert [name for name, value in drawn.items() if torch.equal(after[name], value)] == []


def trained_with(tiny_model: Path, tokenizer: Any, examples: Examples, **changes: Any) -> dict[str, Any]:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples, **changes)
    trainer.train()
    return adapter(trainer.model)


def test_validation_does_not_change_training(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    without = trained_with(tiny_model, tokenizer, examples)
    with_it = trained_with(tiny_model, tokenizer, examples, validates=True, eval_steps=1)
    assert all(torch.equal(with_it[name], weight) for name, weight in without.items())


def test_gradient_checkpointing_changes_no_number(tiny_model: Path, tokenizer: Any, examples: Examples) -> None:
    plain = trained_with(tiny_model, tokenizer, examples)
    checkpointed = trained_with(tiny_model, tokenizer, examples, gradient_checkpointing=True)
    for name, weight in plain.items():
        torch.testing.assert_close(checkpointed[name], weight, rtol=0, atol=1e-5)


def test_the_saved_adapter_changes_the_answers_and_loads_with_plain_peft(
    tiny_model: Path, tokenizer: Any, examples: Examples, tmp_path: Path
) -> None:
    trainer = trainer_for(lora_model(tiny_model), tokenizer, examples, max_steps=6)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=quantization, dtype=torch.float32, attn_implementation="eager"
    )
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = batch_of(examples, [0, 1, 2], tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain.train()  # there is no dropout; in eval mode bitsandbytes computes in bfloat16 on some CPUs
    with torch.no_grad():
        expected, found = trainer.model(**inputs).logits, plain(**inputs).logits
        with plain.disable_adapter():
            untrained = plain(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found - untrained).abs().max()) > 0.5
    labelled = batch["labels"][:, 1:] != IGNORED
    right = (found[:, :-1].argmax(-1) == batch["labels"][:, 1:])[labelled].float().mean()
    before = (untrained[:, :-1].argmax(-1) == batch["labels"][:, 1:])[labelled].float().mean()
    assert right > before + 0.1


def test_one_process_uses_one_gpu_of_a_machine_with_several(tmp_path: Path) -> None:
    arguments = one_gpu_a_process(SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # as if transformers saw two
    assert one_gpu_a_process(arguments).n_gpu == 1


def test_a_package_can_be_made_not_importable() -> None:
    with not_importable("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with not_importable("json"):
        assert importlib.import_module("json") is sys.modules["json"]
