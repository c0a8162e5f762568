"""Shared by the tests of the fused layers: small models of each family, packed texts, and Hugging Face's results to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from finetune.config.schema import RunConfig, TrainingSection
from finetune.data.tokenize import Examples
from finetune.example import IGNORED, targets_of
from finetune.models.device import Device
from finetune.models.fused.model import FusedModel, Packed, pack
from finetune.training.arguments import trainer_arguments
from finetune.training.callbacks import Throughput
from finetune.training.step.plan import StepPlan, plan_step
from finetune.training.trainer import AnswerTrainer, Hooks, build_trainer

CPU = torch.device("cpu")
ON_CPU = Device(CPU, torch.float32)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
VOCABULARY, LAYERS = 96, 3
LENGTHS = (5, 17, 9, 1, 30)
"""Includes a text of one token, which has no label and predicts nothing."""


def lora_model(
    family: str = "mistral", *, r: int = 4, targets: Sequence[str] = PROJECTIONS, dropout: float = 0.0, nf4: bool = False,
    scale: float = 0.1, device: str = "cpu", dtype: torch.dtype = torch.float32, lora: dict[str, Any] | None = None,
    **config: Any,
) -> PeftModel:  # fmt: skip
    """Three layers with random weights, biases and norms, drawn in float32 on the CPU; float32 adapters with a random B, so that
    they have an effect."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "initializer_range": scale, "use_cache": False, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[family](**(values | config)), dtype=torch.float32)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    base.to(device)
    for (
        parameter
    ) in base.parameters():  # buffers, like the rotary frequencies, stay float32 as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    if nf4:
        quantise(base)
    more = lora or {}
    peft = LoraConfig(
        r=r, lora_alpha=3 * r, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM", **more
    )
    model = get_peft_model(base, peft)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.nn.init.normal_(torch.empty(parameter.shape), std=scale).to(device)
        elif "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.data = torch.nn.init.uniform_(torch.empty(parameter.shape), -bound, bound).to(device)
    return model.train()


def quantise(base: Any) -> None:
    """Quantise every projection to NF4 with double quantisation, as transformers loads it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in base.get_decoder().layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if not name.endswith("_proj"):
                    continue
                weight, bias = linear.weight.detach(), linear.bias
                small = Linear4bit(
                    linear.in_features, linear.out_features, bias is not None, weight.dtype, quant_type="nf4"
                )
                small.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=small)
                if bias is not None:
                    small.bias = torch.nn.Parameter(bias.detach().cpu())
                setattr(block, name, small.to(weight.device))
    base.is_loaded_in_4bit = True  # so that PEFT puts its 4-bit LoRA layers around them


def texts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, labels): the second half of each text carries labels."""
    draws = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (length,), generator=draws).tolist() for length in lengths]
    return ids, [[IGNORED] * max(1, len(row) // 2) + row[max(1, len(row) // 2) :] for row in ids]


def labelled(labels: Sequence[Sequence[int]]) -> int:
    return sum(label != IGNORED for row in labels for label in row[1:])


def packed(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: torch.device = CPU) -> Packed:
    return pack(ids, [targets_of(row) for row in labels], device)


def hf_loss(model: Any, ids: Sequence[int], labels: Sequence[int]) -> Tensor:
    """Summed negative log-likelihood of one text, run alone and unpadded through transformers and PEFT."""
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
    targets = torch.tensor(labels[1:], dtype=torch.long, device=model.device)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def adapters(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_gradients(model: Any) -> dict[str, Tensor]:
    """Return the adapters' gradients and reset them."""
    found = {name: parameter.grad.clone() for name, parameter in adapters(model).items()}
    model.zero_grad()
    return found


def hf_gradients(
    model: Any, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss over the labelled tokens, gradients), one text after the other."""
    count, total = labelled(labels), 0.0
    for row, row_labels in zip(ids, labels, strict=True):
        if len(row) > 1:
            loss = hf_loss(model, row, row_labels) / count
            loss.backward()
            total += loss.item()
    return total, take_gradients(model)


def fused_gradients(
    model: Any, batch: Packed, *, uncheckpointed_layers: int = LAYERS, seed: int = 0, fused: FusedModel | None = None
) -> tuple[float, dict[str, Tensor]]:
    fused = fused or FusedModel(model, torch.float32)
    torch.manual_seed(seed)
    loss = fused.loss(batch, uncheckpointed_layers=uncheckpointed_layers)
    loss.backward()
    return loss.item(), take_gradients(model)


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of an adapter's gradient: norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    assert expected
    errors = []
    for name, gradient in expected.items():
        norm = gradient.norm()
        assert norm > 0, f"{name} has no gradient at all"
        errors.append(float((found[name] - gradient).norm() / norm))
    return max(errors)


# --- dropout

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class FixedMask(torch.nn.Module):
    """Replaces LoRA's dropout by the mask that the fused layers draw for one projection of one layer.

    rows: the tokens that the last layer computes after attention; the results of the others reach no loss.
    """

    def __init__(self, ops: ModuleType, p: float, seed: int, stream: int, rows: Tensor | None) -> None:
        super().__init__()
        self.ops, self.p, self.seed, self.stream, self.rows = ops, p, seed, stream, rows

    def forward(self, x: Tensor) -> Tensor:
        """x (1, tokens, width)."""
        if self.rows is None:
            return x * revealed_mask(self.ops, x[0], self.p, self.seed, self.stream)
        mask = torch.zeros_like(x[0])
        mask[self.rows] = revealed_mask(self.ops, x[0, self.rows], self.p, self.seed, self.stream)
        return x * mask


def revealed_mask(ops: ModuleType, x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    """The scaled mask over x (tokens, width) of projection number `stream`, from lora_input_grad_ with ones in g and a."""
    mask = torch.zeros_like(x)
    g, a = x.new_zeros(x.shape[0], stream + 1), x.new_zeros(stream + 1, x.shape[1])
    g[:, stream], a[stream] = 1.0, 1.0
    ops.lora_input_grad_(mask, g, a, 1, p, seed)
    return mask


def put_fixed_masks(model: Any, fused: FusedModel, seed: int, batch: Packed, p: float) -> None:
    """Replace every Dropout of PEFT by the masks that the fused layers draw for a micro-batch with this seed, of one text."""
    for layer, module in zip(fused.layers, model.get_base_model().get_decoder().layers, strict=True):
        for number, group in enumerate(GROUPS):
            modules: list[Any] = [
                getattr(module.self_attn, name, None) or getattr(module.mlp, name, None) for name in group
            ]
            for stream, projection in enumerate(m for m in modules if hasattr(m, "lora_dropout")):
                group_seed = (seed + 1_000_003 * (4 * layer.number + number)) % 2**31
                rows = batch.rows if layer.last and number else None
                projection.lora_dropout["default"] = FixedMask(fused.ops, p, group_seed, stream, rows)


# --- real trainers


def section(**changes: Any) -> TrainingSection:
    """Three steps of 8 examples at a learning rate with a visible effect, without settings that would make runs differ."""
    values: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "optim": "adamw_torch",
        "gradient_checkpointing": False, "group_by_length": False, "logging_steps": 1, "warmup_ratio": 0.0, "eval_steps": 2,
    }  # fmt: skip
    return TrainingSection(**(values | changes))


def plan_for(training: TrainingSection, model: Any, lengths: Sequence[int]) -> StepPlan:
    return plan_step(RunConfig(training=training), model, ON_CPU, lengths)


def trainer_for(
    model: Any, tokenizer: Any, examples: Examples, *, validates: bool = False, plan: dict[str, Any] | None = None,
    say: Callable[[str], None] = print, **changes: Any,
) -> AnswerTrainer:  # fmt: skip
    """The trainer of `finetune train` in the working directory. plan: changes to its step plan."""
    training = section(**changes)
    made = replace(plan_for(training, model, examples.lengths), **(plan or {}))
    arguments = trainer_arguments(
        training,
        ON_CPU,
        made,
        checkpoints=Path("out"),
        run_name="run",
        validates=validates,
    )
    validation = examples if validates else None
    hooks = Hooks(Throughput(), say=say)
    return build_trainer(arguments, model, tokenizer, examples, validation, training, ON_CPU, made, hooks)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
