"""What a run resumes from: which checkpoint, with which config and which ceilings."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.budget.lease import Lease
from finetune.checkpoint.folders import read_manifest
from finetune.checkpoint.store import CheckpointStore, Skipped
from finetune.config.load import load_config, to_dict, with_numbers
from finetune.config.resume_rules import decide, refusal
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.errors import UserError
from finetune.machine.hardware import usable_cores
from finetune.prepared_from import check_prepared_from
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord, StepRecord
from finetune.runtime import distributed
from finetune.runtime.commands import evaluate_command
from finetune.runtime.console import say
from finetune.runtime.files import write_text
from finetune.training.checkpoint_content import REQUIRED, content_fault
from finetune.training.staging import CONFIG, commit_orphaned_save
from finetune.training.step.plan import StepPlan

RETRY_PAUSES = (2.0, 5.0, 0.0)
"""Seconds to wait after each attempt to read a store that reports read errors."""
MOST_ATTEMPTS, MOST_THREADS, MOST_SECONDS = 10**6, 10**5, 10**10
"""More than any run has had: a larger number in run.json is damage."""
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def store_of(run: RunFolder, config: RunConfig, record: RunRecord, lease: Lease) -> CheckpointStore:
    """Raises UserError for a run without an id, which identifies its checkpoints."""
    return CheckpointStore(
        run.checkpoints,
        run_id=id_of(run, record),
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        required=REQUIRED,
        content=content_fault,
        fence=lease,
    )


def id_of(run: RunFolder, record: RunRecord) -> str:
    """Checked here, where it is read: it identifies checkpoints and staged saves."""
    if record.run_id is None:
        raise UserError(
            f"{run.run_json}: run_id: missing; the run is too old to resume: start a new one", code="run.bad_record"
        )
    if not _RUN_ID.fullmatch(record.run_id):
        raise UserError(
            f"{run.run_json}: run_id: expected 32 hexadecimal digits, found {record.run_id[:100]!r}; restore the file, or start "
            "a new run",
            code="run.bad_record",
        )
    return record.run_id


def check_numbers(run: RunFolder, record: RunRecord) -> None:
    """Raises UserError for numbers of run.json that a resume continues from and that no run can have."""
    numbers: list[tuple[str, float | None, float, float]] = [
        ("attempts", record.attempts, 1, MOST_ATTEMPTS),
        ("threads", record.threads, 1, MOST_THREADS),
        ("wall_seconds", record.wall_seconds, 0, MOST_SECONDS),
    ]
    for key, value, least, most in numbers:
        if value is not None and not least <= value <= most:
            raise UserError(
                f"{run.run_json}: {key}: expected a number from {least:g} to {most:g}, found {str(value)[:40]}; restore the "
                "file, or start a new run",
                code="run.bad_record",
            )


def check_unfinished(run: RunFolder, record: RunRecord) -> None:
    """Raises UserError for a run that is done."""
    if record.status == "done":
        raise UserError(
            f"{run.path}: this run is done; start a new one, or score it with `{evaluate_command(run.path)}`",
            code="run.done",
        )


def keep_threads(record: RunRecord, device: torch.device) -> None:
    """On a CPU, use as many threads as the run began with: a different number changes the order of summation, so the result
    would not be bit-identical to an uninterrupted run. If this process has fewer cores, use those and say so.

    record: run.json; if it has no number of threads (an older version), nothing changes.
    """
    began = record.threads
    if began is None or device.type != "cpu":
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = min(began, max(torch.get_num_threads(), usable_cores() // processes))
    if threads < began:
        say(f"began with {began} threads, and there are cores for {threads}: results may differ in the last digits")
    torch.set_num_threads(threads)


def newest_checkpoint(
    run: RunFolder, store: CheckpointStore, config: RunConfig, data: Prepared, backend: str | None
) -> Path | None:
    """The checkpoint to resume from; newer corrupt ones are quarantined, incomplete ones removed.

    Raises UserError if data or config differ from those of the checkpoint in a way that affects what is learned; without a
    checkpoint, if the data are not those of the config.
    """
    commit_orphaned_save(store)
    found, passed_over = _latest(store)
    if found:
        check_same(run, found, config, data, backend)
    else:
        check_prepared_from(data.folder, data.manifest, config.data)
    for item in passed_over:
        say(f"passed over {item.folder}: {item.reason}")
        store.quarantine(item)
    store.clean()
    say(f"resuming from {found}" if found else f"{run.path}: no checkpoint to resume from, starting from the beginning")
    return found


def set_ceilings(run: RunFolder, config: RunConfig, ceilings: Mapping[str, float], found: Path | None) -> None:
    """Write ceilings (keys of the section budget) into the run's config.yaml, like an edit by hand. config: already has them.

    `newest_checkpoint` prints what has changed since the checkpoint; without a checkpoint it is printed here.
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
    """Retries while a newer checkpoint is unreadable, which may be temporary: resuming from an older one loses work."""
    for pause in RETRY_PAUSES:
        found, passed_over = store.latest_valid()
        if not any(item.unreadable for item in passed_over):
            break
        time.sleep(pause)
    return found, passed_over


def check_same(run: RunFolder, folder: Path, config: RunConfig, data: Prepared, backend: str | None) -> None:
    """Prints every key of the config that has changed since the checkpoint, and whether the new value applies.

    backend: fused or hf, as earlier attempts used it (run.json). Raises UserError for changes that are not allowed in a run.
    """
    if read_manifest(folder)["data_hash"] != data.manifest_hash:
        raise UserError(
            f"{folder}: was trained on different data; prepare the same data again, or start a new run",
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
    """Raises UserError if this machine would split the data into other optimizer steps than earlier attempts did. before: the
    step recorded in run.json."""
    before = before or StepRecord()
    batch_size, backend = before.batch_size or plan.batch_size, before.backend or plan.backend
    if batch_size != plan.batch_size:
        raise UserError(
            f"{run.path}: began with {batch_size} examples a step, and {distributed.world_size()} GPUs make it "
            f"{plan.batch_size}; resume on as many GPUs as it began with",
            code="resume.batch_changed",
        )
    if backend != plan.backend and config.training.group_by_length:
        raise UserError(
            f"{run.path}: began with training.kernels {backend}, which groups examples differently from "
            f"{plan.backend}; resume on a machine like the first, or set training.kernels to {backend}",
            code="resume.batch_changed",
        )
