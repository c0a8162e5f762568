"""What a resumed run goes on from: which checkpoint, under which config, with what is left of its budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.checkpoint.store import CheckpointStore, Skipped, read_manifest
from finetune.config.load import load_config, to_dict, with_numbers
from finetune.config.resume_rules import decide, refusal
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.errors import UserError
from finetune.machine.hardware import usable_cores
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord, StepRecord
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.files import write_text
from finetune.training.staging import CONFIG, save_what_was_left
from finetune.training.step.plan import StepPlan

PAUSES = (2.0, 5.0, 0.0)
"""Seconds before a store that has trouble reading is asked again."""


def store_of(run: RunFolder, config: RunConfig, record: RunRecord) -> CheckpointStore:
    """Raises UserError for a run without an id, by which its checkpoints are known."""
    return CheckpointStore(
        run.checkpoints,
        run_id=id_of(run, record),
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )


def id_of(run: RunFolder, record: RunRecord) -> str:
    if record.run_id is None:
        raise UserError(
            f"{run.run_json}: run_id: missing; the run is too old to go on: start a new one", code="run.bad_record"
        )
    return record.run_id


def check_unfinished(run: RunFolder, record: RunRecord) -> None:
    """Raises UserError for a run that is done."""
    if record.status == "done":
        raise UserError(
            f"{run.path}: this run is done; start a new one, or score it with `finetune evaluate {run.path}`",
            code="run.done",
        )


def keep_threads(record: RunRecord, device: torch.device) -> None:
    """On a processor, compute on as many threads as the run began with: sums are taken in another order on another number, and
    the run would end with other bytes than without the interruption. Where the run began on more cores than this process may
    use, it goes on with those, and says so.

    record: run.json; one of before threads were recorded changes nothing.
    """
    began = record.threads
    if began is None or device.type != "cpu":
        return
    threads = min(began, max(1, usable_cores() // distributed.world_size()))
    if threads < began:
        say(f"began with {began} threads, and there are cores for {threads}: the numbers may differ in the last digits")
    torch.set_num_threads(threads)


def newest_checkpoint(
    run: RunFolder, store: CheckpointStore, config: RunConfig, data: Prepared, backend: str | None
) -> Path | None:
    """The checkpoint to go on from; corrupt ones newer than it are quarantined, incomplete ones removed.

    Raises UserError where data or config are no longer those of the checkpoint, as far as they decide what is learned.
    """
    save_what_was_left(store)
    found, passed_over = _latest(store)
    if found:
        check_same(run, found, config, data, backend)
    for item in passed_over:
        say(f"passed over {item.folder}: {item.reason}")
        store.quarantine(item)
    store.clean()
    say(f"resuming from {found}" if found else f"{run.path}: no checkpoint to go on from, starting from the beginning")
    return found


def set_ceilings(run: RunFolder, config: RunConfig, ceilings: Mapping[str, float], found: Path | None) -> None:
    """Put ceilings (keys of the section budget) into the run's config.yaml, as an edit would. config: with them.

    Where there is no checkpoint whose config they are compared with (`newest_checkpoint`), what changes is printed here.
    """
    before = run.config()
    if to_dict(before) == to_dict(config):
        return
    if found is None:
        for change in decide(to_dict(before), to_dict(config), gpus=distributed.world_size()).applies:
            say(str(change))
    text = run.config_yaml.read_text(encoding="utf-8")
    write_text(run.config_yaml, with_numbers(text, "budget", ceilings, config))


def _latest(store: CheckpointStore) -> tuple[Path | None, list[Skipped]]:
    """A newer checkpoint that cannot be read just now may be readable a little later: going on from an older one loses work."""
    for pause in PAUSES:
        found, passed_over = store.latest_valid()
        if not any(item.unreadable for item in passed_over):
            break
        time.sleep(pause)
    return found, passed_over


def check_same(run: RunFolder, folder: Path, config: RunConfig, data: Prepared, backend: str | None) -> None:
    """Prints every key of the config that has changed since the checkpoint, and what becomes of the new value.

    backend: of a step before, fused or hf (run.json). Raises UserError for changes that the rest of the run cannot take.
    """
    if read_manifest(folder)["data_hash"] != data.manifest_hash:
        raise UserError(
            f"{folder}: was trained on other data; prepare the same data again, or start a new run",
            code="resume.data_changed",
        )
    decisions = decide(
        to_dict(load_config(folder / CONFIG)), to_dict(config), gpus=distributed.world_size(), backend=backend
    )
    for change in decisions.applies:
        say(str(change))
    if error := refusal(decisions, run.config_yaml):
        raise error


def check_same_steps(run: RunFolder, config: RunConfig, plan: StepPlan, before: StepRecord | None) -> None:
    """Raises UserError where this machine would make other optimizer steps of the data than the earlier attempts, as run.json
    has them (`before`)."""
    before = before or StepRecord()
    batch_size, backend = before.batch_size or plan.batch_size, before.backend or plan.backend
    if batch_size != plan.batch_size:
        raise UserError(
            f"{run.path}: began with {batch_size} examples a step, and {distributed.world_size()} GPUs make it "
            f"{plan.batch_size}; go on with as many GPUs as it began with",
            code="resume.batch_changed",
        )
    if backend != plan.backend and config.training.group_by_length:
        raise UserError(
            f"{run.path}: began with training.kernels {backend}, for which examples are grouped otherwise than for "
            f"{plan.backend}; go on with a machine like the first, or set training.kernels to {backend}",
            code="resume.batch_changed",
        )
