"""GPU memory of a step on the fused backend (finetune/models/fused/layer.py), added up as finetune/estimate/memory_hf.py
does for the Hugging Face backend. No torch.

The byte counts follow line by line from finetune/models/fused/layer.py, models/fused/ops_triton.py or
models/fused/ops_torch.py, and the kernels of models/fused/attention.py; tests/estimate/test_memory_fused.py runs those
on a CPU under a meter. Only RESERVE is set by measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.estimate.memory_hf import CUBLAS_BYTES, ITEM_BYTES, LABELLED, MemoryEstimate, Workload, base_bytes
from finetune.models.architectures import HEAD_ROWS, ModelShape, projection_names

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RESERVE = 0.29
"""Share of what comes and goes in one layer that torch's allocator holds beyond the peak, with segments that can grow
(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True). Found in the four cells FITTED of
tests/estimate/test_memory_fused.py."""
FLASH_BLOCK = 128
"""Tokens to which FlashAttention's backward pass pads every text in its float32 sums, as a whole block more at most."""
LOOP_SCORES = 4
"""Matrices of a score for every pair of tokens and head that SDPA without a fused kernel has at a time (float32): estimated."""


@dataclass(frozen=True)
class FusedLoad:
    """One packed micro-batch. load: dtype, LoRA and optimizer of the run; load.tokens: of the longest text (rows and padding do
    not count here).

    tokens: of the micro-batch. uncheckpointed_layers: the last so many keep their activations, the others are recomputed.
    dequantized_layers: so many have their 4-bit weights dequantized all the time. ampere: compute capability 8.0 or newer, with
    Triton's operations and FlashAttention, else torch's operations and the memory-efficient kernel; None: unless the dtype is
    float16, which only older GPUs compute in unasked. texts: at most so many in a micro-batch. labelled: share of tokens with a
    label.
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
        """Tokens when every text is as long as the longest, which is how the memory-efficient kernel lays out its sums."""
        return self.texts * min(self.load.tokens, self.tokens)


@dataclass(frozen=True)
class _Moment:
    """Bytes of activations at one point of a step: `saved` for layers behind, `transient` comes and goes."""

    saved: int
    transient: int
    logits: int = 0

    @property
    def total(self) -> int:
        return self.saved + self.transient + self.logits


def fused_estimate(shape: ModelShape, fused: FusedLoad) -> MemoryEstimate:
    """Bytes at the peak of a step. Estimated; tests/estimate/test_memory_fused.py says how far it was from what was
    measured.

    Adapters and their gradients are float32 and always there (finetune/training/step/optimizer.py). Paged optimizer
    state counts, though torch does not count it.
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
    """The head, the backward pass of the last layer, and of the one before, which has all rows; earlier ones need less."""
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
    """Beside the layer's own saved tensors, in bytes: its MLP, and its attention, by when gate and up are gone."""
    item = ITEM_BYTES[fused.load.dtype]
    freed = 2 * shape.intermediate * item * fused.tokens
    attention = item * shape.hidden * fused.tokens + _attention(shape, fused)
    return [_mlp(shape, fused, fused.tokens), attention - freed]


def _last_layer(shape: ModelShape, fused: FusedLoad) -> list[int]:
    """The same for the last layer, whose MLP and output have rows for labelled tokens alone."""
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
    """Bytes that one layer keeps beside its input: q, k, v; attention's output and log-sum-exp; the stream between attention and
    MLP; gate and up; and LoRA's r numbers for each projection. rows: of what lies behind attention, where fewer than tokens."""
    load, item = fused.load, ITEM_BYTES[fused.load.dtype]
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    names = projection_names(load.lora_modules)
    first = len(names & set(GROUPS[0]))
    before = 2 * query + 2 * key + load.lora_r * first
    behind = shape.hidden + 2 * shape.intermediate + load.lora_r * (len(names) - first)
    sums = 0 if item == 4 else 4 * shape.heads * (fused.tokens if fused.on_ampere else fused.padded)
    return item * (before * fused.tokens + behind * (fused.tokens if rows is None else rows)) + sums


def copies_bytes(shape: ModelShape, load: Workload) -> int:
    """The adapters in the compute dtype: A of a group under each other, B on the diagonal of a block matrix."""
    item, names, total = ITEM_BYTES[load.dtype], projection_names(load.lora_modules), 0
    for group in GROUPS:
        columns = load.lora_r * len(names & set(group))
        inputs, outputs = shape.projections[group[0]][0], sum(shape.projections[name][1] for name in group)
        total += columns * (inputs + outputs)
    return item * total * shape.layers


def cache_bytes(shape: ModelShape, fused: FusedLoad) -> int:
    """Unpacked weights that stay; none where the weights are not packed."""
    per_layer = shape.linear_parameters // shape.layers
    return ITEM_BYTES[fused.load.dtype] * per_layer * fused.dequantized_layers if fused.load.four_bit else 0


def _scratch(shape: ModelShape, fused: FusedLoad) -> tuple[int, int]:
    """The buffer into which the largest group's weights are dequantized, with their scales in float32; and the smaller one of the
    first group, which it has replaced. 0 where nothing is dequantized."""
    if not fused.load.four_bit or fused.dequantized_layers == shape.layers:
        return 0, 0
    sizes = [sum(math.prod(shape.projections[name]) for name in group) for group in GROUPS]
    item, largest = ITEM_BYTES[fused.load.dtype], max(sizes)
    scales = 4 * max(math.prod(size) for size in shape.projections.values()) // 64
    return item * largest + scales, item * sizes[0] if sizes[0] < largest else 0


def _per_token(shape: ModelShape, fused: FusedLoad) -> int:
    """Of the whole batch: cos and sin, ids and positions; of the labelled tokens their places, labels and the head's gradient."""
    item = ITEM_BYTES[fused.load.dtype]
    of_rows = 16 + item * shape.hidden
    return (2 * item * shape.head_dim + 16) * fused.tokens + of_rows * fused.labelled_rows
