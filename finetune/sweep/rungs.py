"""At which steps trials are compared, from the prepared data and the config, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.prepared_folder import MANIFEST
from finetune.prepared_from import check_prepared_from
from finetune.runtime.files import read_json
from finetune.sweep.halving import rung_steps


def check_compared(config: RunConfig) -> None:
    """Raises UserError for a config whose runs have no validation loss, whatever its data."""
    if not config.training.eval_steps:
        raise UserError(
            "training.eval_steps: 0, so a trial has no validation loss to be compared by; set it above 0",
            code="sweep.no_validation",
        )


def check_validated(config: RunConfig) -> None:
    """Raises UserError for prepared data that are not those of the config, or have no records to validate on."""
    folder = Path(config.data.output_dir)
    check_prepared_from(folder, _manifest(config), config.data)
    if not _counts(config).get("val"):
        raise UserError(
            f"{folder}: has no validation records, by which trials are compared; set data.val_fraction, or give "
            "records the split val, and prepare the data again",
            code="sweep.no_validation",
        )


def rungs_of(configs: Sequence[RunConfig], eta: int, rungs: int) -> tuple[int, ...]:
    """Equal steps for all: of the shortest training among the trials. Examples that are too long are counted, so a training may
    be a little shorter; its end is then its comparison."""
    return rung_steps(min(map(steps_of, configs)), eta, rungs)


def steps_of(config: RunConfig) -> int:
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    a_pass = math.ceil(int(_counts(config).get("train", 0)) / examples_per_step(training))
    return max(1, math.ceil(a_pass * training.num_train_epochs))


def _counts(config: RunConfig) -> dict[str, int]:
    counts = _manifest(config).get("counts")
    return counts if isinstance(counts, dict) else {}


def _manifest(config: RunConfig) -> dict[str, Any]:
    return read_json(Path(config.data.output_dir) / MANIFEST, "finetune data prepare CONFIG")
