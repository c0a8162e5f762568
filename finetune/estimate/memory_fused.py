"""GPU memory of a step on the fused backend (finetune/models/fused/layer.py), added up as finetune/estimate/memory_hf.py
does for the Hugging Face backend. No torch.

The byte counts follow line by line from finetune/models/fused/layer.py, models/fused/ops_triton.py or
models/fused/ops_torch.py, and the kernels of models/fused/attention.py; tests/estimate/test_memory_fused_meter.py runs those
on a CPU and counts the bytes. Only RESERVE is set by measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.estimate.memory_hf import CUBLAS_BYTES, ITEM_BYTES, LABELLED, MemoryEstimate, Workload, base_bytes
from finetune.models.architectures import HEAD_ROWS, ModelShape, projection_names

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RESERVE = 0.29
"""Memory that torch's allocator holds beyond the peak, as a share of one layer's transient tensors, with expandable segments
(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True). Fitted to the four cells FITTED of tests/estimate/test_memory_fused.py."""
FLASH_BLOCK = 128
"""FlashAttention's backward pass pads every text in its float32 sums, by one block of this many tokens at most."""
LOOP_SCORES = 4
"""Score matrices (tokens x tokens per head, float32) that SDPA without a fused kernel has at a time: estimated."""


@dataclass(frozen=True)
class FusedLoad:
    """One packed micro-batch. load: dtype, LoRA and optimizer of the run; load.tokens: of the longest text (its
    micro_batch_size and padding are not used).

    tokens: of the micro-batch. uncheckpointed_layers: how many of the last layers keep their activations; the others are
    recomputed. dequantized_layers: how many layers keep their 4-bit weights dequantized. ampere: compute capability 8.0 or newer,
    with Triton's operations and FlashAttention; False: torch's operations and the memory-efficient kernel; None: True unless
    the dtype is float16, which is the default only on older GPUs. texts: the most in a micro-batch. labelled: share of tokens
    with a label.
    """

    load: Workload
    tokens: int
    uncheckpointed_layers: int
    dequantized_layers: int = 0
    ampere: bool | None = None
    texts: int = 16
    labelled: float = LABELLED

    @property
    def on_ampere(self) -> bool:
        return self.load.dtype != "float16" if self.ampere is None else self.ampere

    @property
    def labelled_rows(self) -> int:
        return math.ceil(self.labelled * self.tokens)

    @property
    def padded(self) -> int:
        """Tokens if every text were as long as the longest, which is how the memory-efficient kernel lays out its sums."""
        return self.texts * min(self.load.tokens, self.tokens)


@dataclass(frozen=True)
class _Moment:
    """Bytes of activations at one point of a step: `saved` for the backward pass of other layers, `transient` in this layer."""

    saved: int
    transient: int
    logits: int = 0

    @property
    def total(self) -> int:
        return self.saved + self.transient + self.logits


def fused_estimate(shape: ModelShape, fused: FusedLoad) -> MemoryEstimate:
    """Bytes at the peak of a step. Estimated; tests/estimate/test_memory_fused.py has its error against measurements.

    Adapters and their gradients are float32 and always allocated (finetune/training/step/optimizer.py). Paged optimizer
    state is included, though torch does not count it.
    """
    load = fused.load
    lora = shape.lora_parameters(load.lora_r, load.lora_modules)
    copies = copies_bytes(shape, load)
    moments = _moments(shape, fused)
    top = max(moments, key=lambda moment: moment.total)
    of_layer = 2 * copies // shape.layers  # its adapters' gradients, on their way into the flat tensor
    scratch, hole = _scratch(shape, fused)
    workspace = CUBLAS_BYTES + scratch + of_layer + _per_token(shape, fused)
    parts = {
        "base": base_bytes(shape, load) + cache_bytes(shape, fused),
        "adapters": 4 * lora + copies,
        "gradients": 4 * lora,
        "optimizer": math.ceil(lora * load.optimizer_bytes),
        "activations": top.saved + top.transient,
        "logits": top.logits,
        "workspace": workspace,
    }
    transient = [moment.transient + moment.logits for moment in moments]
    if fused.uncheckpointed_layers < shape.layers:
        transient.append(saved_bytes(shape, fused) + max(_layer(shape, fused)))
        transient.append(saved_bytes(shape, fused, rows=fused.labelled_rows) + max(_last_layer(shape, fused)))
    reserve = round(RESERVE * max(transient)) + hole
    return MemoryEstimate(**parts, peak=sum(parts.values()), reserve=reserve)


def _moments(shape: ModelShape, fused: FusedLoad) -> list[_Moment]:
    """The head, and the backward passes of the last layer and the one before it, which has all rows; earlier ones need less."""
    item, tokens, rows = ITEM_BYTES[fused.load.dtype], fused.tokens, fused.labelled_rows
    streams = item * shape.hidden * tokens * shape.layers  # the input of every layer
    layer, last = saved_bytes(shape, fused), saved_bytes(shape, fused, rows=rows)
    middle = fused.uncheckpointed_layers - 1  # uncheckpointed layers beside the last
    behind = streams + max(0, middle) * layer
    moments = [_head(shape, fused, behind + (last if fused.uncheckpointed_layers else 0))]
    for working in _last_layer(shape, fused):
        moments.append(_moment(behind, last, working, saved=fused.uncheckpointed_layers > 0))
    before = streams - item * shape.hidden * tokens + max(0, middle - 1) * layer
    for working in _layer(shape, fused):
        moments.append(_moment(before, layer, working, saved=middle > 0))
    return moments


def _moment(behind: int, layer: int, working: int, *, saved: bool) -> _Moment:
    return _Moment(behind + layer, working) if saved else _Moment(behind, layer + working)


def _head(shape: ModelShape, fused: FusedLoad, saved: int) -> _Moment:
    """The final norm of the labelled rows, and the logits of a block of them: in float32, and beside them once more while
    logsumexp works; or the 16-bit ones that the product gave, in float32, and those of the block before."""
    item, rows = ITEM_BYTES[fused.load.dtype], fused.labelled_rows
    norm = rows * shape.hidden * (4 + item)  # its input in float32, and its result
    width = 8 if rows <= HEAD_ROWS else 8 + item
    return _Moment(saved, norm, min(rows, HEAD_ROWS) * shape.vocab * width)


def _layer(shape: ModelShape, fused: FusedLoad) -> list[int]:
    """Bytes in addition to the layer's saved tensors: in its MLP, and in its attention, when gate and up are already freed."""
    item = ITEM_BYTES[fused.load.dtype]
    freed = 2 * shape.intermediate * item * fused.tokens
    attention = item * shape.hidden * fused.tokens + _attention(shape, fused)
    return [_mlp(shape, fused, fused.tokens), attention - freed]


def _last_layer(shape: ModelShape, fused: FusedLoad) -> list[int]:
    """The same for the last layer, whose MLP and output have rows only for labelled tokens."""
    item, rows = ITEM_BYTES[fused.load.dtype], fused.labelled_rows
    of_rows = (shape.hidden + shape.heads * shape.head_dim - 2 * shape.intermediate) * item * rows
    return [_mlp(shape, fused, rows), _attention(shape, fused) + of_rows]


def _mlp(shape: ModelShape, fused: FusedLoad, rows: int) -> int:
    """The gradient of the layer's output (dy), and: SwiGLU's gradient, with torch's operations two more of that width; or
    the norm's input and two gradients, with torch's operations three in float32."""
    item, hidden, middle = ITEM_BYTES[fused.load.dtype], shape.hidden, shape.intermediate
    if fused.on_ampere:
        return item * rows * max(hidden + middle, 4 * hidden)
    return rows * max(item * (hidden + 3 * middle), 3 * item * hidden + 12 * hidden)


def _attention(shape: ModelShape, fused: FusedLoad) -> int:
    """The most that the backward pass of the attention block holds beside dy: at the kernel the gradients of its input, output
    and result; at the end those, joined, with the norm's output and two gradients."""
    item, tokens, hidden = ITEM_BYTES[fused.load.dtype], fused.tokens, shape.hidden
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shared = shape.heads != shape.kv_heads
    norm = 3 * item * hidden if fused.on_ampere else 2 * item * hidden + 12 * hidden
    end = tokens * (item * (hidden + query + 2 * (query + 2 * key)) + norm)
    at_kernel = item * (hidden + query) * tokens
    if item == 4:  # one text after the other
        kernel = item * (query + 2 * key) * tokens + LOOP_SCORES * 4 * shape.heads * fused.load.tokens**2
    elif fused.on_ampere:  # a gradient of keys and values for every query head; that of queries also in float32
        sums = (tokens + FLASH_BLOCK * fused.texts) * (4 * query + 4 * shape.heads)
        kernel = item * (query + 2 * key + 2 * query * shared) * tokens + sums
    else:  # keys, values and their gradients for every query head; that of queries also in float32, for padded texts
        kernel = item * (3 + 2 * shared) * query * tokens + 4 * (query + shape.heads) * fused.padded
    return max(end, at_kernel + kernel)


def saved_bytes(shape: ModelShape, fused: FusedLoad, rows: int | None = None) -> int:
    """Bytes that one layer saves besides its input: q, k, v; attention's output and log-sum-exp; the residual stream between
    attention and MLP; gate and up; LoRA's r numbers per projection. rows: of everything after attention, if fewer than tokens."""
    load, item = fused.load, ITEM_BYTES[fused.load.dtype]
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    names = projection_names(load.lora_modules)
    first = len(names & set(GROUPS[0]))
    before = 2 * query + 2 * key + load.lora_r * first
    behind = shape.hidden + 2 * shape.intermediate + load.lora_r * (len(names) - first)
    sums = 0 if item == 4 else 4 * shape.heads * (fused.tokens if fused.on_ampere else fused.padded)
    return item * (before * fused.tokens + behind * (fused.tokens if rows is None else rows)) + sums


def copies_bytes(shape: ModelShape, load: Workload) -> int:
    """Bytes of the adapters' copies in the compute dtype: the stacked A of each group, and B as a block-diagonal matrix."""
    item, names, total = ITEM_BYTES[load.dtype], projection_names(load.lora_modules), 0
    for group in GROUPS:
        columns = load.lora_r * len(names & set(group))
        inputs, outputs = shape.projections[group[0]][0], sum(shape.projections[name][1] for name in group)
        total += columns * (inputs + outputs)
    return item * total * shape.layers


def cache_bytes(shape: ModelShape, fused: FusedLoad) -> int:
    """Bytes of the dequantized-weight cache; 0 if the weights are not quantised."""
    per_layer = shape.linear_parameters // shape.layers
    return ITEM_BYTES[fused.load.dtype] * per_layer * fused.dequantized_layers if fused.load.four_bit else 0


def _scratch(shape: ModelShape, fused: FusedLoad) -> tuple[int, int]:
    """Bytes of the buffer for the largest group's dequantized weights, with their float32 scales; and of the first group's
    smaller buffer, which it replaced. 0 if nothing is dequantized at use."""
    if not fused.load.four_bit or fused.dequantized_layers == shape.layers:
        return 0, 0
    sizes = [sum(math.prod(shape.projections[name]) for name in group) for group in GROUPS]
    item, largest = ITEM_BYTES[fused.load.dtype], max(sizes)
    scales = 4 * max(math.prod(size) for size in shape.projections.values()) // 64
    return item * largest + scales, item * sizes[0] if sizes[0] < largest else 0


def _per_token(shape: ModelShape, fused: FusedLoad) -> int:
    """Bytes of cos, sin, ids and positions of all tokens, and of the labelled tokens' indices, labels and head gradient."""
    item = ITEM_BYTES[fused.load.dtype]
    of_rows = 16 + item * shape.hidden
    return (2 * item * shape.head_dim + 16) * fused.tokens + of_rows * fused.labelled_rows
