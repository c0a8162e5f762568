"""One training run, from a config to an adapter: `start` and `resume` read as the list of their steps."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from finetune import checkpoint, ranks
from finetune.callbacks import Budget, CommitCheckpoints, History, ProgressBar, Rehearsal, StopSignals, Throughput
from finetune.cloud.instance import MachinePrice
from finetune.config import RunConfig, config_hash, to_dict
from finetune.credentials import wandb_key_present
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.files import disk_error
from finetune.run_record import RunRecorder, describe_attempt, new_record
from finetune.runs import RunFolder, check_name_is_free, create_run
from finetune.step_plan import StepPlan, plan_step, worst_micro_batch
from finetune.train_parts import Inputs, Parts, inputs_of, load_parts, price_of, say
from finetune.trainer import AnswerTrainer, build_trainer, trainer_arguments

TEMPORARY_ADAPTER = ".adapter.tmp"


@dataclass(frozen=True)
class Session:
    """What one attempt of a run works with."""

    run: RunFolder
    inputs: Inputs
    parts: Parts
    recorder: RunRecorder
    resume_from: Path | None = None


def start(config: RunConfig, config_file: Path) -> int:
    """Begin a new run in a new folder; returns the exit code. Under torchrun every process calls it.

    Raises UserError for what no run can begin with; the folder is made after everything is loaded, so none is left behind.
    """
    began = time.monotonic()
    with ranks.together():
        ranks.from_first(lambda: check_name_is_free(config.training))
        inputs = inputs_of(config)
        parts = load_parts(inputs)
        run = ranks.from_first(lambda: create_run(config, config_file))
        record = new_record(run, config, config_file, inputs.data, inputs.template)
        return _attempt(Session(run, inputs, parts, RunRecorder(run, record, inputs.price, began)))


def resume(run: RunFolder) -> int:
    """Go on with a run from its newest valid checkpoint, with the config in its folder; returns the exit code.

    Budget, tracking, checkpointing, evaluation and the place of the data may have been changed there since. Raises UserError
    for other changes, for other data, and for a run that is done or has no budget left.
    """
    began = time.monotonic()
    with ranks.together():
        config, record = ranks.from_first(lambda: (run.config(), run.record()))
        _check_unfinished(run, config, record)
        inputs = inputs_of(config)
        found = ranks.from_first(lambda: _newest_checkpoint(run, inputs))
        parts = load_parts(inputs)
        record.update(attempts=record.get("attempts", 1) + 1, config=to_dict(config), config_hash=config_hash(config))
        return _attempt(Session(run, inputs, parts, RunRecorder(run, record, inputs.price, began), found))


def _check_unfinished(run: RunFolder, config: RunConfig, record: dict[str, Any]) -> None:
    if record.get("status") == "done":
        raise UserError(
            f"{run.path}: this run is done; start a new one, or score it with `finetune evaluate {run.path}`"
        )
    spent = float(record["wall_seconds"])
    if record.get("status") == "budget_stop" and _budget(config, price_of(config.budget), spent).seconds <= 0:
        raise UserError(
            f"{run.path}: the budget of this run is used up; raise budget.max_hours or budget.max_run_usd in "
            f"{run.config_yaml} to go on with it"
        )


def _newest_checkpoint(run: RunFolder, inputs: Inputs) -> Path | None:
    """The checkpoint to go on from; what stands in its way is put aside or, where it is half a save, removed."""
    found, passed_over = checkpoint.latest_valid(run.checkpoints)
    if found:
        hashes = {"config_hash": _deciding_hash(inputs.config), "data_hash": inputs.data.manifest_hash}
        checkpoint.check_same_run(found, **hashes)
    try:
        for item in passed_over:
            say(f"passed over {item.folder}: {item.reason}")
            checkpoint.put_aside(item.folder)
        checkpoint.remove_leftovers(run.checkpoints)
    except OSError as error:
        raise disk_error(error, run.checkpoints) from error
    say(f"resuming from {found}" if found else f"{run.path}: no checkpoint to go on from, starting from the beginning")
    return found


def _deciding_hash(config: RunConfig) -> str:
    """Hash of the part of a config that decides the weights; the rest may change from one attempt to the next. The data
    have a hash of their own, so that they may lie elsewhere."""
    blank = RunConfig()
    return config_hash(
        replace(
            config,
            data=blank.data,
            checkpoint=blank.checkpoint,
            budget=blank.budget,
            tracking=blank.tracking,
            evaluation=blank.evaluation,
            plan=blank.plan,
        )
    )


def _attempt(session: Session) -> int:
    recorder, inputs, parts = session.recorder, session.inputs, session.parts
    ranks.on_failure(lambda: _close_failed(session, RuntimeError()))
    used = {"train": len(parts.train.dataset), "val": len(parts.validation.dataset)}
    recorder.record["data"].update(path=inputs.config.data.output_dir, used=used)
    try:
        recorder.write(status="running", ended_at=None, **describe_attempt(inputs.config, inputs.device, parts.model))
        return _fit(session)
    except BaseException as error:
        foreseeable = _foreseeable(error, session.run.path)
        _close_failed(session, error)
        if foreseeable:
            raise foreseeable from error
        raise


def _fit(session: Session) -> int:
    config, parts, recorder = session.inputs.config, session.parts, session.recorder
    plan = _plan(session)
    throughput = Throughput()
    trainer = _trainer(session, plan, throughput)
    history = History(lambda rows: recorder.progress(trainer.state, throughput, rows, plan, trainer.stepper))
    budget = _budget(config, session.inputs.price, float(recorder.record["wall_seconds"]))
    with StopSignals(say, ranks.any_of) as signals, ProgressBar(history) as bar:
        first = rehearsal(trainer, plan, parts.train.dataset)
        for callback in (history, bar, signals, budget, _committer(session), first):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    recorder.progress(trainer.state, throughput, history.rows, plan, trainer.stepper)
    return _finish(session, trainer, budget)


def _plan(session: Session) -> StepPlan:
    """How a step is computed on this GPU; its questions may not change from one attempt to the next."""
    inputs, record = session.inputs, session.recorder.record
    lengths = session.parts.train.dataset["length"]
    plan = plan_step(inputs.config, session.parts.model, inputs.device, lengths, gpus=ranks.count())
    before = record.get("step", {}).get("questions")
    if session.resume_from and before not in (None, plan.questions):
        raise UserError(
            f"{session.run.path}: began with {before} questions a step, and {ranks.count()} GPUs make it {plan.questions}; go on "
            "with as many GPUs as it began with"
        )
    say(str(plan) if ranks.count() == 1 else f"{ranks.count()} processes, each with {plan}")
    session.recorder.planned(plan)
    return plan


def _trainer(session: Session, plan: StepPlan, throughput: Throughput) -> AnswerTrainer:
    config, parts, device = session.inputs.config, session.parts, session.inputs.device
    validates = bool(config.training.eval_steps and len(parts.validation.dataset))
    arguments = trainer_arguments(
        config.training,
        device,
        plan,
        checkpoints=session.run.checkpoints,
        run_name=session.run.path.name,
        save_steps=config.checkpoint.save_steps,
        report_to=_report_to(session),
        validates=validates,
    )
    trainer = build_trainer(
        arguments,
        parts.model,
        parts.tokenizer,
        parts.train.dataset,
        parts.validation.dataset if validates else None,
        throughput,
        config.training,
        device,
        plan,
        say,
    )
    ranks.draw_apart(config.training.seed)
    ranks.same_everywhere(trainer.stepper.adapters.parameter.data)
    return trainer


def rehearsal(trainer: AnswerTrainer, plan: StepPlan, train: Dataset) -> Rehearsal:
    """On a GPU the largest micro-batch comes first, with gradients that are thrown away: memory that does not suffice shows
    after seconds, not after hours."""
    on_cpu = trainer.args.device.type == "cpu"
    return Rehearsal(lambda: None if on_cpu else _rehearse(trainer, plan, train))


def _rehearse(trainer: AnswerTrainer, plan: StepPlan, train: Dataset) -> None:
    worst = worst_micro_batch(
        train["length"], plan.limits, plan.rows, questions=plan.questions, padded=plan.path == "stock"
    )
    trainer.model.train()
    trainer.stepper.rehearse([train[index] for index in worst])


def _budget(config: RunConfig, price: MachinePrice | None, seconds_before: float) -> Budget:
    return Budget(
        max_hours=config.budget.max_hours,
        max_run_usd=config.budget.max_run_usd,
        usd_per_hour=price.usd_per_hour if price else None,
        seconds_before=seconds_before,
        agree=lambda spent: ranks.from_first(lambda: spent),
    )


def _committer(session: Session) -> CommitCheckpoints:
    return CommitCheckpoints(
        session.run.checkpoints,
        keep_last=session.inputs.config.checkpoint.keep_last,
        config_hash=_deciding_hash(session.inputs.config),
        data_hash=session.inputs.data.manifest_hash,
        wait=ranks.wait,
    )


def _finish(session: Session, trainer: AnswerTrainer, budget: Budget) -> int:
    """Save the adapter unless the run is to go on, close the record, say how it ended; returns the exit code."""
    run = session.run
    done = trainer.state.global_step >= trainer.state.max_steps
    status = "done" if done else "budget_stop" if budget.exhausted else "interrupted"
    if status != "interrupted" and ranks.first():
        _save_adapter(session, trainer)
    session.recorder.close(status)
    say(
        {
            "done": f"{run.path}: done; the adapter is in {run.adapter}",
            "budget_stop": f"{run.path}: the budget is used up; the adapter of the last step is in {run.adapter}",
            "interrupted": f"{run.path}: interrupted, a checkpoint is saved; go on with `finetune train --resume {run.path}`",
        }[status]
    )
    return EXIT_TRANSIENT if status == "interrupted" else EXIT_OK


def _save_adapter(session: Session, trainer: AnswerTrainer) -> None:
    """Adapter, tokenizer and prompt template in one folder, which appears whole: it is saved under another name first."""
    temporary = session.run.path / TEMPORARY_ADAPTER
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.save_pretrained(str(temporary))
    session.parts.tokenizer.save_pretrained(str(temporary))
    session.inputs.template.save(temporary)
    if session.run.adapter.exists():  # of an attempt that stopped at its budget
        shutil.rmtree(session.run.adapter)
    os.replace(temporary, session.run.adapter)


def _foreseeable(error: BaseException, folder: Path) -> UserError | None:
    """The message for a full disk, which safetensors and torch report by other errors than OSError, and a full GPU."""
    if isinstance(error, OSError):
        return disk_error(error, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "out of GPU memory, not in a step's passes, which begin again in smaller pieces, but in validation or beside them: "
            "lower training.per_device_eval_batch_size, set training.max_memory_gib below what the GPU has, or lower "
            "model.max_seq_length"
        )
    torch_write = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20
    if torch_write or "No space left" in str(error):
        return disk_error(OSError(errno.ENOSPC, str(error)), folder)
    return None


def _close_failed(session: Session, error: BaseException) -> None:
    """Leave a run folder that says how the run ended, without halves of a save; none at all if the run never began."""
    if not ranks.first():
        return
    try:
        checkpoint.remove_leftovers(session.run.checkpoints)
        shutil.rmtree(session.run.path / TEMPORARY_ADAPTER, ignore_errors=True)
        session.recorder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    except (OSError, UserError) as another:  # the fault that brought us here is the one to report
        say(str(another))
        if not session.run.run_json.exists():
            shutil.rmtree(session.run.path, ignore_errors=True)


def _report_to(session: Session) -> list[str]:
    """TensorBoard always; W&B when a key is there or it is asked for."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(session.run.tensorboard)
    wanted = session.inputs.config.tracking.wandb
    if wanted == "disabled" or (wanted == "auto" and not wandb_key_present()):
        return ["tensorboard"]
    os.environ["WANDB_MODE"] = "offline" if wanted == "offline" else "online"
    os.environ["WANDB_PROJECT"] = session.inputs.config.tracking.wandb_project
    os.environ["WANDB_DIR"] = str(session.run.path)
    return ["tensorboard", "wandb"]
