"""The size of a run: its training examples and tokens, counted if the data are prepared, else assumed and labelled so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig, SourceSection
from finetune.errors import NotEstimated, UserError
from finetune.prepared_folder import MANIFEST
from finetune.runtime.files import load_json


@dataclass(frozen=True)
class RunSize:
    """records: training examples of one epoch; mean_tokens: prompt and answer of one; steps: optimizer steps of the run.

    validation_tokens: of all validation passes together. basis: where the figures come from, as text for the user.
    """

    records: int
    mean_tokens: float
    steps: int
    tokens: float  # trained on, over all epochs
    validation_tokens: float
    basis: str


def run_size(config: RunConfig) -> RunSize:
    """The size of a run, from the prepared data's manifest.json, else from local sources or plan.records.

    Raises UserError if the number of examples is unknown, or the manifest is invalid.
    """
    folder = Path(config.data.output_dir)
    manifest = folder / MANIFEST
    if manifest.is_file():
        records, mean, validation, basis = _counted(manifest, config.plan.mean_tokens)
    else:
        records, validation, basis = _assumed_records(config)
        mean = config.plan.mean_tokens
        basis = f"{basis}, {mean:.0f} tokens each (plan.mean_tokens); not counted, because {folder} is not prepared"
    training = config.training
    per_epoch = -(-records // examples_per_step(training))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)
    tokens = records * mean * steps / per_epoch
    passes = -(-steps // training.eval_steps) if training.eval_steps else 0  # the trainer adds one at the end
    return RunSize(records, mean, steps, tokens, passes * validation * mean, basis)


def _counted(manifest: Path, assumed_tokens: float) -> tuple[int, float, int, str]:
    """Training examples, mean tokens, validation examples, and their source as text, from a prepared folder."""
    try:
        content = load_json(manifest)
        counts, tokens = content["counts"], content["tokens"]
        records, validation = int(counts["train"]), int(counts["val"])
        train = tokens["train"] if tokens else None
        total = train["total"] if train else None
        if records < 1 or validation < 0:
            raise ValueError("no training examples")
        if total is None:
            basis = (
                f"{records:,} examples of {manifest}, {assumed_tokens:.0f} tokens each (plan.mean_tokens; not counted)"
            )
            return records, assumed_tokens, validation, basis
        if int(total) < records:
            raise ValueError(f"{total} tokens in {records} examples")
        return records, int(total) / records, validation, f"counted in {manifest}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{manifest}: not a manifest of prepared data ({error!r}); run `finetune data prepare`",
            code="data.bad_manifest",
        ) from error


def _assumed_records(config: RunConfig) -> tuple[int, int, str]:
    """Training and validation examples after the split, and the source of these numbers as text."""
    data = config.data
    train_share = 1 - data.val_fraction - data.test_fraction
    found = {"auto": 0, "train": 0}
    unknown = False
    for source in data.sources:
        if source.split in ("auto", "train"):
            records = _source_records(source)
            found[source.split] += records or 0
            unknown = unknown or records is None
    if config.plan.records is not None:
        kept, basis = config.plan.records, "plan.records"
        validation = round(kept / train_share * data.val_fraction)
    elif not unknown and found["auto"] + found["train"]:
        kept = max(1, round(found["auto"] * train_share) + found["train"])
        validation = round(found["auto"] * data.val_fraction)
        basis = "counted in the local sources, less the held-out fractions"
    else:
        raise NotEstimated(
            f"{data.output_dir}: the data are not prepared, so their size is unknown; run `finetune data prepare "
            f"CONFIG`, or set plan.records to the number of training examples",
            code="data.unknown_size",
        )
    if data.max_train_records is not None and data.max_train_records < kept:
        kept, basis = data.max_train_records, f"data.max_train_records, of {kept:,}: {basis}"
    return kept, validation, f"{kept:,} training examples ({basis})"


def _source_records(source: SourceSection) -> int | None:
    """Records of a local source, counted; None for a source that is not on this machine."""
    path = Path(source.path)
    try:
        if source.kind == "jsonl" and path.is_file():
            with path.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
        if source.kind == "spider" and path.is_dir():
            return sum(len(load_json(path / name)) for name in source.files)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})", code="file.unreadable") from error
    return None
