"""run.json, the record of a run: its inputs, its progress, its measurements and its cost.

Fields are named like the keys of the file. Nearly all may be absent: a run adds them as they become known, and earlier versions
of this tool did not write all of them. Unknown keys (of a later version) are kept. Units: seconds, tokens, GiB, US dollars;
times are UTC, in ISO 8601.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runtime.files import read_json, write_json
from finetune.runtime.typed_json import Mismatch, decode, encode

OLD_STEP_KEYS = {
    "path": "backend",
    "questions": "batch_size",
    "rows": "micro_batch_size",
    "kept_layers": "uncheckpointed_layers",
    "cached_layers": "dequantized_layers",
}
OLD_BACKENDS = {"lean": "fused", "stock": "hf"}
"""Names in earlier versions of the keys of `step`, and of its backend: those of `training.kernels`, too."""

Row = Mapping[str, float | None]
"""One log entry: step, epoch, and some of loss, eval_loss, learning_rate, grad_norm, tokens_per_second."""


@dataclass
class DataRecord:
    """The prepared data set. counts: records per split; used: records per split that fit into model.max_seq_length; dialects: of
    the training records, the most frequent first."""

    path: str | None = None
    manifest_sha256: str | None = None
    counts: Mapping[str, int] | None = None
    used: Mapping[str, int] | None = None
    dialects: Sequence[str] | None = None


@dataclass
class GpuRecord:
    """memory_gib: memory of each of the `count` GPUs."""

    name: str | None = None
    memory_gib: float | None = None
    compute_capability: Sequence[int] | None = None
    count: int | None = None


@dataclass
class HardwareRecord:
    """The machine of the last attempt. gpu: None if it has none. dtype: the compute dtype."""

    platform: str | None = None
    cpu: str | None = None
    cores: int | None = None
    ram_gib: float | None = None
    gpu: GpuRecord | None = None
    dtype: str | None = None


@dataclass
class ModelRecord:
    """quantization: the type of the 4-bit weights, None if the weights are not in 4 bits."""

    name: str | None = None
    revision: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    quantization: str | None = None


@dataclass
class StepRecord:
    """How an optimizer step is computed: as planned, or as changed since by the OOM fallback.

    batch_size (examples) and ranks (processes, one per GPU) describe the whole step, all other fields one rank.
    micro_batch_size: None unless the config sets a number; then micro_batch_tokens does not limit it. backend: fused or hf.
    out_of_memory, bad_steps: counts of the last attempt.
    """

    backend: str | None = None
    why: str | None = None
    batch_size: int | None = None
    ranks: int | None = None
    micro_batch_tokens: int | None = None
    micro_batch_size: int | None = None
    uncheckpointed_layers: int | None = None
    dequantized_layers: int | None = None
    checkpointing: bool | None = None
    out_of_memory: int | None = None
    bad_steps: int | None = None


@dataclass
class MemoryRecord:
    """Peaks of the last attempt on the GPU of rank 0, in GiB, as torch's allocator handed out (peak) and held (reserved)."""

    predicted_peak_gib: float | None = None
    predicted_reserved_gib: float | None = None
    measured_peak_gib: float | None = None
    measured_reserved_gib: float | None = None
    basis: str | None = None


@dataclass
class SavesRecord:
    """Cost of saving in the last attempt. stall_share: share of its training time. committed_step and below: the last save."""

    count: int | None = None
    stall_seconds: float | None = None
    stall_share: float | None = None
    committed_step: int | None = None
    commit_seconds: float | None = None
    bytes: int | None = None


@dataclass
class StepCount:
    done: int
    planned: int | None = None


@dataclass
class TokenCount:
    trained: int | None = None


@dataclass
class LossesRecord:
    first: float | None = None
    last: float | None = None
    eval_first: float | None = None
    eval_last: float | None = None


@dataclass
class PeakMemory:
    """Over all attempts. value: in GiB. kind: what was measured."""

    value: float
    kind: str


@dataclass
class UsageRecord:
    """Cost of all attempts and the ceilings on it. usd: None if the price is unknown."""

    usd: float | None = None
    hours: float | None = None
    ceiling_usd: float | None = None
    ceiling_hours: float | None = None
    projected_usd: float | None = None
    basis: str | None = None


@dataclass
class AttemptRecord:
    """One attempt as recorded in the ledger. reason: how it ended; None while it runs or if it was killed."""

    attempt: int | None = None
    started_at: str | None = None
    machine: str | None = None
    zone: str | None = None
    gpu: str | None = None
    spot: bool | None = None
    usd_per_hour: float | None = None
    hours: float | None = None
    usd: float | None = None
    from_step: int | None = None
    to_step: int | None = None
    reason: str | None = None


@dataclass
class StopRecord:
    """What requested the last attempt to stop. seconds: from the request to the checkpoint."""

    reason: str | None = None
    detail: str | None = None
    seconds: float | None = None


@dataclass(init=False)
class RunRecord:
    """adapter_step: step of the adapter in the run's folder. attempts: number started. threads: torch's threads at the start."""

    status: str | None = None
    run_id: str | None = None
    run_name: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    config_file: str | None = None
    config: Mapping[str, Any] | None = None
    config_hash: str | None = None
    data: DataRecord | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    prompt_version: str | None = None
    python: str | None = None
    packages: Mapping[str, str] | None = None
    seed: int | None = None
    threads: int | None = None
    attempts: int = 1
    wall_seconds: float | None = None
    history: Sequence[Row] | None = None
    spent_usd: float | None = None
    spent_basis: str | None = None
    spending: UsageRecord | None = None
    attempt_log: Sequence[AttemptRecord] | None = None
    hardware: HardwareRecord | None = None
    model: ModelRecord | None = None
    step: StepRecord | None = None
    memory: MemoryRecord | None = None
    steps: StepCount | None = None
    epochs: float | None = None
    tokens: TokenCount | None = None
    losses: LossesRecord | None = None
    tokens_per_second: float | None = None
    saves: SavesRecord | None = None
    peak_memory_gib: PeakMemory | None = None
    stop: StopRecord | None = None
    adapter_step: int | None = None


def read_record(path: Path) -> RunRecord:
    """Raises UserError if the file is missing or invalid; the message names the invalid key."""
    values = read_json(path, "finetune train CONFIG")
    try:
        return decode(RunRecord, _with_new_names(values))
    except Mismatch as mismatch:
        raise UserError(f"{path}: {mismatch}", code="run.bad_record") from mismatch


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    step = values.get("step")
    if not isinstance(step, dict):
        return values
    renamed = {OLD_STEP_KEYS.get(key, key): value for key, value in step.items()}
    if isinstance(backend := renamed.get("backend"), str):
        renamed["backend"] = OLD_BACKENDS.get(backend, backend)
    return values | {"step": renamed}


def write_record(path: Path, record: RunRecord) -> None:
    """Raises UserError when the disk is full or the folder is not writable."""
    write_json(path, encode(record))
