"""The fused estimate against what was measured on one H100, and in itself (finetune/models/fused/layer.py itself:
tests/estimate/test_memory_fused_meter.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.estimate.memory_fused import FusedLoad, cache_bytes, copies_bytes, fused_estimate, saved_bytes
from finetune.estimate.memory_hf import Workload
from finetune.machine.hardware import GIB
from finetune.models.architectures import PROJECTIONS, SHAPES, ModelShape

MISTRAL = SHAPES["mistralai/Mistral-7B-v0.1"]
TOLERANCE = 0.03
"""How far reserved memory may be from what was measured; the peak may be a tenth of that."""


@dataclass(frozen=True)
class Cell:
    """A measured step of Mistral-7B, LoRA r 16. tokens: of the largest micro-batch. GiB as torch counts them. paged: optimizer
    state, which torch does not count. ampere: False for torch's operations and the memory-efficient kernel."""

    tokens: int
    uncheckpointed_layers: int
    dequantized_layers: int
    peak: float
    reserved: float
    dtype: str = "bfloat16"
    dropout: float = 0.05
    longest: int = 2048
    labelled: float = 592 / 4696
    ampere: bool = True
    paged: bool = True
    texts: int = 16

    @property
    def fused(self) -> FusedLoad:
        load = Workload(1, self.longest, dtype=self.dtype, lora_dropout=self.dropout)
        load = replace(load, optimizer_bytes=0) if self.paged else load
        return FusedLoad(
            load, self.tokens, self.uncheckpointed_layers, self.dequantized_layers,
            ampere=self.ampere, texts=self.texts, labelled=self.labelled,
        )  # fmt: skip


FITTED = [
    Cell(6595, 32, 32, 36.32, 36.45),
    Cell(6595, 32, 0, 23.54, 23.78),
    Cell(6595, 0, 0, 7.09, 7.43),
    Cell(6595, 0, 32, 19.87, 20.16),
]
"""benchmarks/fused_step.py on one H100 80GB, torch 2.11, 2026-11-22, segments that can grow, 8-bit AdamW that is not paged. The
layers of that day kept gate and up through the whole backward pass and had a row for every token in the last layer, too;
gradients came and went with each step."""


def alike(row: tuple[int, int, int, float, float], **kind: Any) -> Cell:
    """A cell of benchmarks/fused_memory.py: texts of 300 tokens, 37 of them answer."""
    return Cell(*row, longest=300, labelled=37 / 300, texts=row[0] // 300, **kind)


HELD_OUT = [
    *(alike(row) for row in (
        (600, 32, 0, 6.254, 6.438), (1500, 32, 32, 21.578, 21.615), (3000, 32, 0, 13.036, 13.098),
        (3000, 0, 0, 5.614, 5.801), (6000, 32, 32, 34.296, 34.357), (6000, 16, 0, 13.792, 13.855),
        (9000, 0, 0, 7.731, 8.281), (9000, 32, 0, 29.993, 30.057), (12000, 8, 16, 21.805, 21.863),
        (12000, 0, 32, 21.57, 22.01), (15000, 32, 0, 46.949, 47.047), (18000, 0, 0, 10.906, 11.814),
    )),
    *(alike(row, dtype="float16", ampere=False) for row in (
        (600, 32, 0, 6.276, 6.457), (1500, 32, 32, 21.633, 21.676), (3000, 32, 0, 13.144, 13.254),
        (3000, 0, 0, 5.773, 5.918), (6000, 32, 32, 34.51, 34.611), (6000, 16, 0, 14.006, 14.189),
        (9000, 0, 0, 8.21, 8.496), (9000, 32, 0, 30.314, 30.545), (12000, 8, 16, 22.23, 22.449),
        (12000, 0, 32, 22.209, 22.654), (15000, 32, 0, 47.483, 47.789), (18000, 0, 0, 11.865, 12.518),
    )),
]  # fmt: skip
"""benchmarks/fused_memory.py on two H100 80GB, torch 2.11, 2026-11-23. The estimate is as it was before they were measured."""


def of_that_day(cell: Cell) -> tuple[float, float]:
    """(peak, reserved) in bytes by the estimate, with the backward pass of FITTED: gradients were not there yet, and the last
    layer's attention had gate and up beside it."""
    fused = replace(cell.fused, load=replace(cell.fused.load, optimizer_bytes=2 + 8 / 256))
    needed = fused_estimate(MISTRAL, fused)
    query, key = MISTRAL.heads * MISTRAL.head_dim, MISTRAL.kv_heads * MISTRAL.head_dim
    kernel = 2 * cell.tokens * (2 * MISTRAL.hidden + 4 * query + 2 * key) + (cell.tokens + 128 * 16) * 4 * (query + 32)
    end = 2 * cell.tokens * (5 * MISTRAL.hidden + 3 * query + 4 * key)
    working, layer = max(kernel, end), saved_bytes(MISTRAL, fused)
    streams = 2 * MISTRAL.hidden * cell.tokens * MISTRAL.layers
    activations = streams + layer * max(1, cell.uncheckpointed_layers) + working
    other = needed.peak - needed.activations - needed.logits - needed.gradients
    passing = working if cell.uncheckpointed_layers else working + layer
    hole = 0 if cell.dequantized_layers else 2 * MISTRAL.hidden * (query + 2 * key)
    return other + activations, other + activations + 0.29 * passing + hole


@pytest.mark.parametrize("cell", FITTED, ids=str)
def test_the_measured_cells_of_an_earlier_backward_pass(cell: Cell) -> None:
    peak, reserved = of_that_day(cell)
    assert peak / GIB == pytest.approx(cell.peak, rel=0.002)
    assert reserved / GIB == pytest.approx(cell.reserved, rel=0.004)


@pytest.mark.parametrize("cell", HELD_OUT, ids=str)
def test_the_cells_that_were_predicted(cell: Cell) -> None:
    needed = fused_estimate(MISTRAL, cell.fused)
    assert needed.peak / GIB == pytest.approx(cell.peak, rel=TOLERANCE / 10)
    assert needed.reserved / GIB == pytest.approx(cell.reserved, rel=TOLERANCE)


# ---- by hand


def test_a_layer_of_mistral_keeps_92_kilobytes_a_token() -> None:
    """q, k, v and attention's output 10,240 numbers, the stream 4,096, gate and up 28,672, LoRA 7 x 16; 32 sums in float32."""
    fused = FusedLoad(Workload(1, 2048), 1000, 32)
    assert saved_bytes(MISTRAL, fused) == 1000 * (2 * (10_240 + 4096 + 28_672 + 112) + 128)
    fewer = saved_bytes(MISTRAL, fused) - saved_bytes(MISTRAL, fused, rows=400)
    assert fewer == 600 * 2 * (4096 + 28_672 + 4 * 16)  # o, gate, up and down


def test_copies_of_the_adapters_are_blocks_on_a_diagonal() -> None:
    load = Workload(1, 1)
    wanted = 48 * (4096 + 6144) + 16 * (4096 + 4096) + 32 * (4096 + 28_672) + 16 * (14_336 + 4096)
    assert copies_bytes(MISTRAL, load) == 2 * 32 * wanted
    some = copies_bytes(MISTRAL, replace(load, lora_modules=("q_proj", "up_proj")))
    assert some == 2 * 32 * (16 * (4096 + 6144) + 16 * (4096 + 28_672))


def test_dequantized_weights_cost_two_bytes_a_parameter_and_nothing_if_unquantised() -> None:
    all_layers = FusedLoad(Workload(1, 1), 1, 0, 32)
    assert cache_bytes(MISTRAL, all_layers) == 2 * 6_979_321_856
    assert cache_bytes(MISTRAL, replace(all_layers, load=Workload(1, 1, four_bit=False))) == 0
    scratch = fused_estimate(MISTRAL, replace(all_layers, dequantized_layers=31)).workspace
    assert scratch - fused_estimate(MISTRAL, all_layers).workspace == 2 * 28_672 * 4096 + 4 * 14_336 * 4096 // 64


def test_the_buffer_of_the_first_group_stays_behind_in_the_reserve() -> None:
    """Where weights are dequantized at use: q, k and v of 6,144 x 4,096, which gate and up have outgrown."""
    packed, cached = (fused_estimate(MISTRAL, FusedLoad(Workload(1, 1), 4000, 32, n)).reserve for n in (0, 32))
    assert packed - cached == 2 * 6144 * 4096


def test_a_recomputed_layer_is_transient() -> None:
    none, two, most, all_layers = (
        fused_estimate(MISTRAL, FusedLoad(Workload(1, 1), 4000, n)).reserve for n in (0, 2, 31, 32)
    )
    assert none == two == most > all_layers + 0.15 * saved_bytes(MISTRAL, FusedLoad(Workload(1, 1), 4000, 0))


def test_adapters_and_gradients_are_always_there() -> None:
    needed = fused_estimate(MISTRAL, FusedLoad(Workload(1, 1), 100, 0))
    assert needed.gradients == 4 * 41_943_040
    assert needed.adapters == 4 * 41_943_040 + copies_bytes(MISTRAL, Workload(1, 1))


def test_float16_means_an_older_gpu_unless_given() -> None:
    fused = FusedLoad(Workload(1, 2048, dtype="float16"), 4000, 0)
    assert fused_estimate(MISTRAL, fused) == fused_estimate(MISTRAL, replace(fused, ampere=False))
    newer = fused_estimate(MISTRAL, replace(fused, ampere=True))
    assert newer.peak < fused_estimate(MISTRAL, fused).peak
    assert newer == fused_estimate(MISTRAL, replace(fused, load=Workload(1, 2048)))  # bfloat16, to the byte


def test_a_large_vocabulary_peaks_at_the_head() -> None:
    qwen = SHAPES["Qwen/Qwen2.5-7B"]
    fused = FusedLoad(Workload(1, 2048), 8000, 0)
    assert fused_estimate(qwen, fused).logits == 1024 * 152_064 * 10  # the block before is still there
    assert fused_estimate(qwen, replace(fused, tokens=2000)).logits == 500 * 152_064 * 8
    assert fused_estimate(MISTRAL, fused).logits == 0


# ---- whatever the model


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([64, 128]))
    hidden = kv_heads * groups * head_dim
    return ModelShape(
        "drawn", hidden, draw(st.integers(3, 80)), kv_heads * groups, kv_heads, head_dim,
        hidden * draw(st.integers(1, 5)), draw(st.integers(1000, 200_000)), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


WORKLOADS = st.builds(
    Workload,
    micro_batch_size=st.just(1),
    tokens=st.integers(1, 4096),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    lora_r=st.integers(1, 256),
    lora_modules=st.sets(st.sampled_from(PROJECTIONS), min_size=1).map(tuple),
    four_bit=st.booleans(),
    lora_dropout=st.sampled_from([0, 0.05]),
)


@st.composite
def loads(draw: st.DrawFn) -> tuple[ModelShape, FusedLoad]:
    shape = draw(shapes())
    layers = st.integers(0, shape.layers)
    return shape, FusedLoad(
        draw(WORKLOADS), draw(st.integers(1, 40_000)), draw(layers), draw(layers), ampere=draw(st.booleans()),
        texts=draw(st.integers(1, 64)), labelled=draw(st.floats(0.01, 1)),
    )  # fmt: skip


@given(loads())
def test_the_parts_add_up(drawn: tuple[ModelShape, FusedLoad]) -> None:
    needed = fused_estimate(*drawn)
    assert sum(needed.parts.values()) == needed.reserved == needed.peak + needed.reserve
    assert all(isinstance(size, int) and size >= 0 for size in needed.parts.values())


@given(
    loads(),
    st.sampled_from(["tokens", "uncheckpointed_layers", "dequantized_layers", "texts", "labelled"]),
    st.integers(1, 4096),
)
def test_more_never_needs_less(drawn: tuple[ModelShape, FusedLoad], field: str, more: int) -> None:
    """The bisection in finetune/estimate/fit.py relies on it."""
    shape, fused = drawn
    most = {"uncheckpointed_layers": shape.layers, "dequantized_layers": shape.layers, "labelled": 1.0}
    larger = replace(fused, **{field: min(getattr(fused, field) + more, most.get(field, 10**6))})
    assert fused_estimate(shape, larger).peak >= fused_estimate(shape, fused).peak
    assert fused_estimate(shape, larger).reserved >= fused_estimate(shape, fused).reserved
