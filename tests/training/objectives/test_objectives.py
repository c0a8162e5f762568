"""A training objective is one file and one registry entry: a toy objective trains through the command with its own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.train_helpers import record_of

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from finetune.cli.main import main  # noqa: E402
from finetune.config.schema import ModelSection  # noqa: E402
from finetune.data.prompts import PromptTemplate, completion, encode_examples  # noqa: E402
from finetune.data.records import read_records  # noqa: E402
from finetune.example import IGNORED, Example  # noqa: E402
from finetune.models.fused import model as fused_model  # noqa: E402
from finetune.models.load import load_tokenizer  # noqa: E402
from finetune.training.objectives.registry import OBJECTIVES  # noqa: E402
from tests.helpers.fused_examples import lora_model, packed, take_gradients, texts, worst_error  # noqa: E402
from tests.training.objectives.toy import SMOOTHING, TOY, smoothed  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
WHOLE = {"effective_batch_size": 24, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": None}
"""All training examples in one step, so that the first loss is the untrained model's on all of them."""


def first_losses(tiny_model: Path, tiny_data: Path) -> tuple[float, float]:
    """(toy, sft) loss of the untrained model on the training set, computed with transformers only."""
    records = read_records(tiny_data / "train.jsonl")
    tokenizer: Any = load_tokenizer(ModelSection(name=str(tiny_model)))
    prompts = [PromptTemplate().render_record(record) for record in records]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for example in encode_examples(tokenizer, prompts, [completion(record.sql) for record in records]):
        ids = torch.tensor(example.ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        for which, (start, smoothing) in enumerate(((0, SMOOTHING), (example.answer_start - 1, 0.0))):
            loss = torch.nn.functional.cross_entropy(
                logits[start:], ids[start + 1 :], label_smoothing=smoothing, reduction="sum"
            )
            sums[which] += loss.item()
            counts[which] += len(ids) - 1 - start
    return sums[0] / counts[0], sums[1] / counts[1]


@pytest.mark.parametrize("kernels", ["fused", "hf"])
def test_a_registered_objective_is_trained(
    kernels: str, tiny_config: Any, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "toy", TOY)
    training = WHOLE | {"kernels": kernels, "max_steps": 4, "eval_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
    losses: list[list[float]] = []
    for name in ("toy", "sft"):
        config = tiny_config(training=training | {"objective": name}, quantization={"load_in_4bit": False})
        assert main(["train", str(config)]) == 0
        record = record_of(tmp_path / "runs" / f"tiny-00{len(losses) + 1}")
        assert record["config"]["training"]["objective"] == name
        assert [row["step"] for row in record["history"] if row.get("eval_loss")] == [2, 4]
        losses.append([row["loss"] for row in record["history"] if row.get("loss")])
    toys, sfts = losses
    expected_toy, expected_sft = first_losses(tiny_model, tiny_data)
    assert abs(expected_toy - expected_sft) > 0.01 * expected_sft, "the losses are too alike to tell them apart"
    assert toys[0] == pytest.approx(expected_toy, rel=1e-4)
    assert sfts[0] == pytest.approx(expected_sft, rel=1e-4)
    assert toys[-1] < toys[0]


def test_the_fused_backend_computes_any_loss_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradients whether all logits are computed at once, or in blocks and recomputed in the backward pass."""
    monkeypatch.setattr(fused_model, "HEAD_ROWS", 7)
    model = lora_model()
    fused = fused_model.FusedModel(model, torch.float32)
    ids, labels = texts((30, 17))
    batch = packed(ids, labels)
    logits = fused.hidden(batch, uncheckpointed_layers=2, training=True) @ fused.base.get_output_embeddings().weight.t()
    expected = smoothed(logits, batch.targets) / 11
    expected.backward()
    whole = take_gradients(model)
    loss = fused.loss(batch, 11, uncheckpointed_layers=2, token_loss=smoothed)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_error(take_gradients(model), whole) < 1e-5


def test_an_unknown_objective_is_a_user_error(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("training.unknown_objective"):
        assert main(["train", str(tiny_config(training={"objective": "stf"}))]) == 2
    assert "training.objective: 'stf' is not one of sft" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- the example that all objectives share


@pytest.mark.parametrize(
    ("start", "targets", "predicted"),
    [(2, [IGNORED, 7, 8, IGNORED], 2), (1, [6, 7, 8, IGNORED], 3), (0, [6, 7, 8, IGNORED], 3), (4, [IGNORED] * 4, 0)],
)
def test_a_target_is_the_next_token_if_that_has_a_loss(start: int, targets: list[int], predicted: int) -> None:
    example = Example([5, 6, 7, 8], start)
    assert (example.targets, example.predicted, example.answer_tokens) == (targets, predicted, 4 - start)
    assert example.labels == [IGNORED] * start + [5, 6, 7, 8][start:]
