"""The fused backend: computes a PEFT model from packed examples to the loss on their answers, with the layers of
finetune/models/fused/layer.py.

The model itself stays that of transformers and PEFT, with their parameters, names and saved adapters; this only reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.example import IGNORED
from finetune.models.architectures import FAMILIES, HEAD_ROWS
from finetune.models.fused import attention, ops_torch
from finetune.models.fused.attention import Segments
from finetune.models.fused.base_weights import Scratch, Weights, joined_bias
from finetune.models.fused.layer import Batch, Group, Layer

if TYPE_CHECKING:
    from peft import PeftModel

PLAIN_LORA = re.compile(r"\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.default\.weight$")


@dataclass(frozen=True)
class Packed:
    """Packed examples, each prompt and answer. ids, positions (tokens,); rows: indices of the tokens that predict a labelled
    token (labelled,); targets: those labels (labelled,). All int64 on one device."""

    ids: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    segments: Segments


def pack(ids: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Pack texts. Row i of ids and of targets is one text; targets: what each of its tokens has to predict, or IGNORED."""
    lengths = [len(row) for row in ids]
    flat = torch.tensor([token for row in ids for token in row])
    labels = torch.tensor([target for row in targets for target in row])
    rows = (labels != IGNORED).nonzero().squeeze(1)
    positions = torch.cat([torch.arange(length) for length in lengths])
    flat, positions, rows, labels = (
        tensor.to(device, non_blocking=True) for tensor in (flat, positions, rows, labels[rows])
    )
    return Packed(flat, positions, rows, labels, Segments.of(lengths, device))


def unsupported_reason(model: PeftModel, longest: int) -> str | None:
    """Why the fused backend cannot run this model, in a few words; None if it can. longest: tokens of the longest example."""
    base = model.get_base_model()
    name, config = type(base).__name__, base.config
    known = [family.causal_lm for family in FAMILIES.values()]
    if name not in known:
        return f"{name} is not one of {', '.join(known)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return f"texts of {longest} tokens are longer than the model's attention window of {window}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    if _head_dim(config) % 8:
        return f"its head dimension, {_head_dim(config)}, is not a multiple of 8"
    inside = {id(p) for layer in base.get_decoder().layers for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in model.parameters()):
        return "it has adapters outside the decoder layers"
    if any(p.requires_grad and not PLAIN_LORA.search(name) for name, p in model.named_parameters()):
        return "it trains more than LoRA's A and B of the layers' projections"
    lora: Any = model.peft_config.get("default")
    if lora is None or lora.rank_pattern or lora.alpha_pattern:
        return "its adapters differ in rank or scaling"
    if getattr(config, "attention_dropout", 0.0):
        return f"it has dropout on attention weights (attention_dropout={config.attention_dropout})"
    return None


class FusedModel:
    """A PEFT model's weights as the fused layers need them. dtype: of the computation.

    dequantized_layers: the first layers, this many, also keep their 4-bit weights dequantized; the others dequantize them at
    every use into one scratch buffer.
    """

    def __init__(
        self, model: PeftModel, dtype: torch.dtype, *, dequantized_layers: int = 0, ops: ModuleType | None = None,
        backend: attention.Backend | None = None,
    ) -> None:  # fmt: skip
        self.model, self.dtype = model, dtype
        self.base: Any = model.get_base_model()
        self.decoder: Any = self.base.get_decoder()
        self.device = next(model.parameters()).device
        self.ops = ops or ops_for(self.device)
        self.backend = backend or attention.backend_for(self.device, dtype)
        self.dropout = max((float(p) for p in _dropouts(model)), default=0.0)
        self._head = self.base.get_output_embeddings().weight.detach().to(dtype)
        self._scratch = Scratch(dtype, self.device)
        self.layers = [
            _layer(number, layer, self.base.config, dtype, self._scratch, cached=number < dequantized_layers)
            for number, layer in enumerate(self.decoder.layers)
        ]
        self.refresh()

    def refresh(self) -> None:
        """Copy the adapters' values: call it after an optimizer step, and after a checkpoint was loaded."""
        pairs = [group.copies() for layer in self.layers for group in layer.groups]
        with torch.no_grad():
            torch._foreach_copy_([to for pair in pairs for to in pair[0]], [p for pair in pairs for p in pair[1]])

    def free_dequantized(self) -> bool:
        """Free all cached dequantized weights; returns whether there were any."""
        forgotten = [group.weight.forget() for layer in self.layers for group in layer.groups]
        return any(forgotten)

    def hidden(self, packed: Packed, *, uncheckpointed_layers: int, training: bool) -> Tensor:
        """(labelled, hidden): the last hidden states, after the norm, of the tokens that predict a label."""
        # From the CPU's generator, which needs no wait for the GPU and is part of a checkpoint. Validation draws none.
        seed = int(torch.randint(2**31, ())) if training else 0
        x = self.decoder.embed_tokens(packed.ids).to(self.dtype)
        cos, sin = self.decoder.rotary_emb(x[None], packed.positions[None])
        dropout = self.dropout if training else 0.0
        batch = Batch(packed.segments, packed.rows, cos[0], sin[0], self.ops, self.backend, dropout, seed)
        first_uncheckpointed = len(self.layers) - uncheckpointed_layers
        for layer in self.layers:
            x = layer(x, batch, keep=layer.number >= first_uncheckpointed)
        result: Tensor = self.decoder.norm(x)
        return result

    def loss(
        self, packed: Packed, count: int | None = None, *, uncheckpointed_layers: int, training: bool = True,
        token_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Summed loss of the labelled tokens divided by `count`, by default their number.

        token_loss: maps logits (tokens, vocabulary) in float32 and targets (tokens,) to a sum; None: negative log-likelihood
        (nats). uncheckpointed_layers: this many of the last layers save what their backward pass needs, the others are
        recomputed.
        """
        hidden = self.hidden(packed, uncheckpointed_layers=uncheckpointed_layers, training=training)
        total: Tensor
        if token_loss is None:
            total = _HeadLoss.apply(hidden, self._head, packed.targets)  # type: ignore[no-untyped-call]
        else:
            total = _loss_in_blocks(hidden, self._head, packed.targets, token_loss)
        return total / max(1, packed.targets.numel() if count is None else count)


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropy of hidden @ weight', one block of rows at a time; the forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], HEAD_ROWS):
            block = slice(begin, begin + HEAD_ROWS)
            logits = (hidden[block] @ weight.t()).float()
            labels = targets[block, None]
            log_sum = logits.logsumexp(1, keepdim=True)
            total += (log_sum - logits.gather(1, labels)).sum()
            if gradient is not None:
                share = logits.sub_(log_sum).exp_()
                share.scatter_add_(1, labels, share.new_full(labels.shape, -1.0))
                gradient[block] = share.to(hidden.dtype) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (ctx.gradient.float() * gradients[0]).to(ctx.gradient.dtype), None, None


def _loss_in_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sum of token_loss; the backward pass recomputes a block's logits, so that only one block's are held at a time."""

    def of_block(rows: Tensor, labels: Tensor) -> Tensor:
        return token_loss((rows @ weight.t()).float(), labels)

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, labels in zip(torch.split(hidden, HEAD_ROWS), torch.split(targets, HEAD_ROWS), strict=True):
        total = total + checkpoint(of_block, rows, labels, use_reentrant=False)
    return total


def ops_for(device: torch.device) -> ModuleType:
    """Triton's operations if they run here (compute capability >= 8.0 and Triton installed), else torch's."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            from finetune.models.fused import ops_triton
        except ImportError:
            return ops_torch
        return ops_triton
    return ops_torch


def _layer(number: int, layer: Any, config: Any, dtype: torch.dtype, scratch: Scratch, *, cached: bool) -> Layer:
    def group(*projections: Any) -> Group:
        return _group(projections, dtype, scratch, cached=cached)

    attention_block, mlp = layer.self_attn, layer.mlp
    return Layer(
        number=number,
        last=number == config.num_hidden_layers - 1,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        eps=layer.input_layernorm.variance_epsilon,
        input_norm=layer.input_layernorm.weight.detach(),
        middle_norm=layer.post_attention_layernorm.weight.detach(),
        qkv=group(attention_block.q_proj, attention_block.k_proj, attention_block.v_proj),
        o=group(attention_block.o_proj),
        gate_up=group(mlp.gate_proj, mlp.up_proj),
        down=group(mlp.down_proj),
    )


def _group(projections: Sequence[Any], dtype: torch.dtype, scratch: Scratch, *, cached: bool) -> Group:
    bases = [getattr(projection, "base_layer", projection) for projection in projections]
    outputs = [base.out_features for base in bases]
    present = [projection for projection in projections if hasattr(projection, "lora_A")]
    adapters = [
        (projection.lora_A["default"].weight, projection.lora_B["default"].weight) if projection in present else None
        for projection in projections
    ]
    scaling = present[0].scaling["default"] if present else 1.0
    return Group(
        Weights(bases, dtype, scratch, cached=cached), joined_bias(bases, dtype), outputs, adapters, scaling, dtype
    )


def _dropouts(model: Any) -> list[float]:
    return [m.p for n, m in model.named_modules() if ".lora_dropout." in n and isinstance(m, torch.nn.Dropout)]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
