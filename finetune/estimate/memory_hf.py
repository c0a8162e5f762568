"""GPU memory of one QLoRA training step, added up from the model's shape. Arithmetic only: needs no torch and no GPU.

The peak of a step is the largest of a few moments. Each is a sum: weights, adapters and optimizer state, which stay; what
autograd has saved of other layers; and the tensors of the layer or head being computed. The byte counts follow from the
operations of transformers' Llama family (RMSNorm in float32, rotary embedding, SDPA, SwiGLU), PEFT's LoRA on bitsandbytes'
4-bit layers and TRL's fused head. LABELLED and the two slacks are set by measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.machine.hardware import GIB
from finetune.models.architectures import PROJECTIONS, ModelShape, projection_names

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

CUBLAS_BYTES = 64 * 2**20
"""Workspaces of cuBLAS and cuBLASLt: 64 MiB on the H100 of the grid. Older GPUs take less."""
CONTEXT_GIB = 0.5
"""What CUDA itself takes outside of torch's allocator (context, kernels, libraries). Estimated: an H100 that reports 79.1 GiB
let one run reserve 78.4 GiB, so it was at most 0.7 GiB there."""
LABELLED = 0.25
"""Share of tokens that have a label and so reach the fused head; fitted to the grid's bytes per token. Text-to-SQL answers
are about 0.12 of their examples (also measured there), so this overestimates."""
SLACK, DROPOUT_SLACK = 0.40, 0.12
"""What torch's allocator holds beyond the peak: one dequantized weight, and this share of the transient tensors of one layer or
head. Calibrated: SLACK against the grid, DROPOUT_SLACK (a layer whose LoRA has dropout) against our own runs. Why they
differ is presumed: with dropout the peak comes before the layer at work has freed anything. Every measured run had one shape;
lengths that vary leave more behind (up to 1.5 times the peak was seen), which the allocator gives back when it runs out."""
GRID_PEAK_ERROR, PEAK_ERROR, RESERVED_ERROR = 0.001, 0.01, 0.03
"""How far the estimate is at most from what was measured on one H100 80GB with torch 2.11 and Mistral-7B's shape in NF4: peak in
46 cells of a grid (bfloat16 adapters, no dropout, no padding), peak in ten cells of our own trainer, where it is 0.2 to 0.7%
too high, mostly for paged state, and reserved in all 56. tests/estimate/test_memory_hf.py holds them."""
ADAMW_8BIT_BYTES, ADAMW_BYTES = 2 + 8 / 256, 8.0
"""Optimizer state per parameter: two moments, of one byte with a float32 scale per block of 256, or of float32. Paged state
(bitsandbytes pages tensors of 100,000 elements and more: half of Mistral's) is memory that the GPU may hand to the host; it
counts here, though torch does not count it."""
TRL_HEAD_ROWS, TRL_HEAD_COLUMNS = 4096, 32768
"""Tokens and vocabulary entries in one tile of TRL's fused head (trl 1.16, kernels/chunked_logprob.py)."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch and how it is trained. The defaults are those of our trainer and of configs/mistral_7b_qlora.yaml.

    micro_batch_size x tokens: the micro-batch, padding included. dtype: of the computation.
    adapter_bytes: per adapter parameter; where it differs from dtype's, autocast makes copies in dtype.
    optimizer_bytes: state per adapter parameter. head: "full" makes the logits of every token.
    padded: rows of unequal length under a padding mask. SDPA then keeps the mask in every layer, and each query head gets
    its own copy of keys and values. accumulating: gradients of earlier micro-batches are already allocated.
    """

    micro_batch_size: int
    tokens: int
    dtype: str = "bfloat16"
    checkpointing: bool = True
    head: Literal["fused", "full"] = "fused"
    lora_r: int = 16
    lora_modules: tuple[str, ...] = PROJECTIONS
    adapter_bytes: int = 4
    optimizer_bytes: float = ADAMW_8BIT_BYTES
    four_bit: bool = True
    double_quant: bool = True
    lora_dropout: float = 0.05
    padded: bool = True
    accumulating: bool = True

    @property
    def size(self) -> int:
        """Tokens of the micro-batch."""
        return self.micro_batch_size * self.tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step, by what they are for, and what the caching allocator holds beyond it."""

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int
    reserve: int

    @property
    def reserved(self) -> int:
        return self.peak + self.reserve

    @property
    def parts(self) -> dict[str, int]:
        """In print order; they add up to `reserved`."""
        names = ("base", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "reserve")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Moment:
    """Bytes at one point of a step: `saved` for the backward pass of other layers, the rest is transient."""

    saved: float
    working: float
    logits: float
    dequantised: float = 0.0
    gradients: float = 0.0
    slack: float = SLACK

    @property
    def transient(self) -> float:
        return self.working + self.logits + self.dequantised

    @property
    def total(self) -> float:
        return self.saved + self.transient + self.gradients


def estimate(shape: ModelShape, load: Workload) -> MemoryEstimate:
    """Memory of one training step in bytes. Estimated; see GRID_PEAK_ERROR for its error.

    Holds for SDPA with a fused kernel. Not counted: eager attention, which keeps every score, and validation, whose forward
    pass took a quarter of the bytes per token of training with checkpointing (in the grid).
    """
    lora = shape.lora_parameters(load.lora_r, load.lora_modules)
    base, adapters = base_bytes(shape, load), lora * load.adapter_bytes
    optimizer = math.ceil(lora * load.optimizer_bytes)
    moments = _moments(shape, load, adapters)
    top = max(moments, key=lambda moment: moment.total)
    # One byte for each pair of positions, made once
    masks = load.micro_batch_size * load.tokens**2 if load.padded else 0
    workspace = CUBLAS_BYTES + 16 * load.size + masks + round(top.dequantised)  # 16: ids and labels, int64
    gradients, activations, logits = round(top.gradients), round(top.saved + top.working), round(top.logits)
    peak = base + adapters + optimizer + gradients + activations + logits + workspace
    reserve = round(_dequantized_weight(shape, load) + max(moment.slack * moment.transient for moment in moments))
    return MemoryEstimate(base, adapters, gradients, optimizer, activations, logits, workspace, peak, reserve)


def base_bytes(shape: ModelShape, load: Workload) -> int:
    """The frozen weights: projections in 4 bits with their scales (or in dtype), the rest in dtype.

    A 4-bit layer has a scale per 64 weights: float32, or with double quantisation one byte, and a float32 per 256 of those.
    Its tables of codes and the offset take 2,048 bytes, the simple one 512, as the allocator rounds them.
    """
    item = _item_bytes(load.dtype)
    rest = (shape.parameters - shape.linear_parameters) * item
    if not load.four_bit:
        return shape.linear_parameters * item + rest
    layer = 0
    for inputs, outputs in shape.projections.values():
        blocks = inputs * outputs / 64
        scales = _block(blocks) + _block(4 * blocks / 256) + 2048 if load.double_quant else _block(4 * blocks) + 512
        layer += _block(inputs * outputs / 2) + scales
    return shape.layers * layer + rest


def saved_per_layer(shape: ModelShape, load: Workload, mask_bytes: int = 1) -> int:
    """Bytes that autograd saves of one decoder layer until its backward pass.

    Per token: each of the two norms its input in float32 and one factor; attention its queries, keys, values, output and one
    float32 a head; SwiGLU the gate before and after SiLU, and the other half; LoRA its input (shared where projections share
    it) and the r numbers between A and B. With dropout every projection has an input of its own, and a mask of mask_bytes
    for each of its elements (1 on a GPU).
    """
    item, names = _item_bytes(load.dtype), projection_names(load.lora_modules)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 * shape.hidden + 4)
    attention = item * (2 * query + 2 * (query if load.padded else key)) + 4 * shape.heads
    per_token = norms + attention + item * 3 * shape.intermediate + item * load.lora_r * len(names)
    if load.lora_dropout:
        per_token += sum((item + mask_bytes) * shape.projections[name][0] for name in names)
    else:  # o_proj's input is attention's output, which is saved anyway
        shared = bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"gate_proj", "up_proj"})
        per_token += item * (shape.hidden * shared + shape.intermediate * ("down_proj" in names))
    # The mask, as SDPA adds it to the scores
    bias = item * load.micro_batch_size * load.tokens**2 if load.padded else 0
    casts = item * shape.lora_parameters(load.lora_r, load.lora_modules) // shape.layers
    return per_token * load.size + bias + (casts if load.adapter_bytes != item else 0)


def _moments(shape: ModelShape, load: Workload, adapters: int) -> list[_Moment]:
    """The points of a step at which it may peak: at the head, in the last layer, and in the first one when the others have
    their gradients. When accumulating, all gradients are there from the beginning."""
    stream = _item_bytes(load.dtype) * shape.hidden * load.size  # one hidden state per token
    layer = saved_per_layer(shape, load)
    if load.checkpointing:  # the input of every layer; the layer at work is recomputed
        saved, first, recomputed = stream * shape.layers, stream, layer
    else:  # the embeddings and every layer
        saved, first, recomputed = stream + layer * shape.layers, stream + layer, 0
    behind = adapters * (shape.layers - 1) / shape.layers
    begin, end = (adapters, adapters) if load.accumulating else (0, behind)
    return [
        *_head_moments(shape, load, saved, begin),
        *_layer_moments(shape, load, saved, recomputed, begin),
        *_layer_moments(shape, load, first, recomputed, end),
    ]


def _head_moments(shape: ModelShape, load: Workload, saved: int, gradients: float) -> list[_Moment]:
    """The loss, and the backward pass of the final norm: its input in float32, four more of that size and two in dtype."""
    item, size, hidden = _item_bytes(load.dtype), load.size, shape.hidden
    norm = (4 * hidden + 4) * size
    if load.head == "full":  # logits in dtype; their log-softmax and two gradients in float32
        logits = (item + 12) * shape.vocab * size
    else:  # the labelled hidden states, their float32 gradient, and one tile of logits with its product
        labelled = LABELLED * size
        logits = round(
            (item + 4) * hidden * labelled + min(labelled, TRL_HEAD_ROWS) * (item * TRL_HEAD_COLUMNS + 4 * hidden)
        )
    norm_backward = norm + (4 * 4 + 2 * item) * hidden * size
    return [
        _Moment(saved, norm, logits, gradients=gradients),
        _Moment(saved, norm_backward, _living_logits(shape, load), gradients=gradients),
    ]


def _layer_moments(shape: ModelShape, load: Workload, saved: int, recomputed: int, gradients: float) -> list[_Moment]:
    """The MLP of one layer, at its largest moments. recomputed: bytes of the layer if it is recomputed, else 0.

    Backward: in down_proj, beside the weight that it dequantizes, the gradients of its output and twice of its input (base and
    LoRA); in SwiGLU three gradients of that width. down_proj's input is free by then.
    Before it, with checkpointing: down_proj at the end of the second forward pass, with the weight that it dequantizes, then with
    its input's dropout. The layer is there in full, and beside it the gradient of its output, once more scaled for LoRA; the
    residual; down_proj's output; and the inputs of gate_proj and down_proj, unless LoRA keeps these very tensors, which
    dropout prevents. Seen so on an H100, block by block; no float32 copies, since PEFT casts nothing under autocast.
    """
    item, size, middle = _item_bytes(load.dtype), load.size, shape.intermediate
    names, dropout = projection_names(load.lora_modules), bool(load.lora_dropout)
    own_input = middle * size * (item + dropout) if "down_proj" in names else 0  # LoRA's, with the mask of its dropout
    weight, logits = _dequantized_weight(shape, load), _living_logits(shape, load)
    slack = DROPOUT_SLACK if dropout else SLACK
    backward = recomputed - own_input + item * size * (shape.hidden + 2 * middle)
    moments = [(backward, weight), (backward + item * size * middle, 0)]
    if load.checkpointing:
        inputs = shape.hidden * (dropout or not names & {"gate_proj", "up_proj"})
        inputs += middle * (dropout or "down_proj" not in names)
        forward = recomputed + item * size * (4 * shape.hidden + inputs)
        moments += [(forward - own_input * dropout, weight), (forward, 0)]
    return [_Moment(saved, working, logits, dequantized, gradients, slack) for working, dequantized in moments]


def _dequantized_weight(shape: ModelShape, load: Workload) -> float:
    """A weight of the MLP in dtype and its float32 scales, while a 4-bit layer is computed."""
    return shape.hidden * shape.intermediate * (_item_bytes(load.dtype) + 4 / 64) if load.four_bit else 0


def _living_logits(shape: ModelShape, load: Workload) -> int:
    """A full head's logits stay referenced, by the model's output, through the backward pass."""
    return _item_bytes(load.dtype) * shape.vocab * load.size if load.head == "full" else 0


def workload_of(config: RunConfig, dtype: str) -> Workload:
    """The worst micro-batch that this config allows, trained as our trainer does on a GPU that computes in `dtype`."""
    training = config.training
    return Workload(
        micro_batch_size=1 if training.per_device_train_batch_size == "auto" else training.per_device_train_batch_size,
        tokens=config.model.max_seq_length,
        dtype=dtype,
        checkpointing=training.gradient_checkpointing is not False,
        lora_r=config.lora.r,
        lora_modules=tuple(config.lora.target_modules),
        optimizer_bytes=ADAMW_8BIT_BYTES if training.optim.endswith("8bit") else ADAMW_BYTES,
        four_bit=config.quantization.load_in_4bit,
        double_quant=config.quantization.bnb_4bit_use_double_quant,
        lora_dropout=config.lora.lora_dropout,
        accumulating=True,  # the flat tensor of all gradients (finetune/training/step/optimizer.py) is always there
    )


def fits(needed: MemoryEstimate, memory_gib: float) -> bool:
    """Whether the reserved memory and CUDA's own CONTEXT_GIB fit into what the GPU reports as total (GiB)."""
    return needed.reserved / GIB + CONTEXT_GIB <= memory_gib


def largest_micro_batch(shape: ModelShape, load: Workload, memory_gib: float) -> int:
    """The largest micro-batch, in rows of load.tokens, that fits into memory_gib (GiB); 0 if not even one row fits."""

    def fit(micro_batch_size: int) -> bool:
        return fits(estimate(shape, replace(load, micro_batch_size=micro_batch_size)), memory_gib)

    if not fit(1):
        return 0
    low, high = 1, 2
    while fit(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def _item_bytes(dtype: str) -> int:
    if dtype not in ITEM_BYTES:
        raise UserError(
            f"model.torch_dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype}", code="model.bad_dtype"
        )
    return ITEM_BYTES[dtype]


def _block(size: float) -> int:
    """Bytes as torch's allocator rounds them, to multiples of 512."""
    return math.ceil(size / 512) * 512
