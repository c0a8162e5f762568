"""One training run, from a config to an adapter: `start` and `resume` read as the list of their steps."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.budget.run_budget import Spending
from finetune.checkpoint.async_saver import Committed, Saver
from finetune.checkpoint.store import read_manifest
from finetune.config.load import config_hash, load_config, to_dict
from finetune.config.schema import RunConfig
from finetune.data.tokenize import Examples
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.run_folder import RunFolder, check_name_is_free, create_run
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.stop_request import Stop, StopSignals
from finetune.training.adapter import (
    adapter_from,
    adapter_is_of,
    foreseeable,
    remove_halves,
    save_adapter,
    stop_hanging,
    tell_end,
)
from finetune.training.arguments import trainer_arguments
from finetune.training.callbacks import BeforeFirstStep, History, ProgressBar, Throughput
from finetune.training.record import RunRecorder, describe_attempt, new_record
from finetune.training.resume import check_same_steps, check_unfinished, newest_checkpoint, set_ceilings, store_of
from finetune.training.save_policy import EndOfStep, StepAbandoned
from finetune.training.setup import Inputs, Parts, inputs_of, load_parts
from finetune.training.snapshot import WINDOW, Snapshots, check_resumed, scratch_folder
from finetune.training.step.plan import StepPlan, plan_step, worst_micro_batch
from finetune.training.tracking import trackers
from finetune.training.trainer import AnswerTrainer, Hooks, build_trainer


@dataclass(frozen=True)
class Session:
    """What one attempt of a run works with. resume_from: the checkpoint that it goes on from."""

    run: RunFolder
    inputs: Inputs
    recorder: RunRecorder
    spending: Spending
    stop: Stop
    resume_from: Path | None = None

    @property
    def attempt(self) -> int:
        return int(self.recorder.record["attempts"])


def start(config: RunConfig, config_file: Path) -> int:
    """Begin a new run in a new folder; returns the exit code. Under torchrun every process calls it.

    Raises UserError for what no run can begin with; then no folder is left behind.
    """
    began = time.monotonic()
    with distributed.together():
        distributed.from_first(lambda: check_name_is_free(config.training))
        inputs = inputs_of(config)
        run = distributed.from_first(lambda: create_run(config, config_file))
        record = new_record(run, config, config_file, inputs.data, inputs.template)
        return _attempt(run, inputs, distributed.from_first(lambda: record), None, began)


def resume(run: RunFolder, ceilings: Mapping[str, float] | None = None) -> int:
    """Go on with a run from its newest valid checkpoint, with the config in its folder; returns the exit code.

    `resume_rules` says what may have been changed there since. ceilings: keys of the section budget, such as max_run_usd, to be
    written into it once nothing else stands in the way. Raises UserError for other changes, for other data, and for a run
    that is done or has no budget left.
    """
    began = time.monotonic()
    with distributed.together():
        typed = [f"budget.{name}={value!r}" for name, value in (ceilings or {}).items()]
        config, record = distributed.from_first(lambda: (load_config(run.config_yaml, typed), run.record()))
        check_unfinished(run, record)
        inputs = inputs_of(config)
        store = store_of(run, config, record["run_id"])
        path = record.get("step", {}).get("path")
        found = distributed.from_first(lambda: newest_checkpoint(run, store, config, inputs.data, path))
        if ceilings:
            distributed.from_first(lambda: set_ceilings(run, config, ceilings, found))
        record.update(attempts=record.get("attempts", 1) + 1, config=to_dict(config), config_hash=config_hash(config))
        return _attempt(run, inputs, record, found, began)


def _attempt(run: RunFolder, inputs: Inputs, record: dict[str, Any], found: Path | None, began: float) -> int:
    stop = Stop(say)
    step = read_manifest(found)["step"] if found else 0
    spending = Spending(run, inputs.config, inputs.price, stop, attempt=int(record["attempts"]), step=step)
    recorder, before = RunRecorder(run, record, spending, began, found), record.get("status")
    session = Session(run, inputs, recorder, spending, stop, found)
    distributed.on_failure(lambda: _close_failed(session, RuntimeError()))
    if refusal := spending.nothing_left():
        return _refused(session, refusal, before)
    try:
        recorder.write(status="running", ended_at=None)  # first of all: a folder without run.json is no run
        with spending.metered(hard_stop=lambda: stop_hanging(run, recorder)):
            return _fit(session, load_parts(inputs))
    except BaseException as error:
        expected = foreseeable(error, run.path)
        _close_failed(session, error)
        if expected:
            raise expected from error
        raise


def _fit(session: Session, parts: Parts) -> int:
    inputs, recorder, run = session.inputs, session.recorder, session.run
    _describe(session, parts)
    plan = _plan(session, parts)
    throughput = Throughput()
    ends = EndOfStep(
        session.stop,
        save_steps=inputs.config.checkpoint.save_steps,
        every_minutes=inputs.config.checkpoint.every_minutes,
    )
    hooks = Hooks(throughput, session.spending.series, ends.abandon_if_too_late, say)
    trainer = _trainer(session, parts, plan, hooks)
    saver = _saver(session) if distributed.first() else None
    snapshots = Snapshots(trainer, saver, run, inputs.config, inputs.data, inputs.template, session.attempt)

    def write(_: object = None) -> None:
        recorder.progress(trainer.state, throughput, plan, trainer.stepper, snapshots.saves)

    history = History(write)
    session.spending.follow(lambda: (trainer.state.global_step, trainer.state.max_steps), throughput.wall_seconds)
    with StopSignals(session.stop), ProgressBar(history, session.spending.short) as bar, session.spending.notices():
        tracking = trackers(inputs.config.tracking, run.path, run.path.name, _step_of(session), say)
        for callback in (*tracking, history, bar, ends, snapshots, _before(session, trainer, plan)):
            trainer.add_callback(callback)
        with closing(saver) if saver else nullcontext():
            _train(session, trainer, snapshots)
            if saver:
                _committed(session, saver, snapshots)
    with suppress(OSError):
        Path(trainer.args.output_dir).rmdir()  # unless a snapshot is kept in it
    write()
    return _finish(session, trainer, parts, ends)


def _describe(session: Session, parts: Parts) -> None:
    inputs = session.inputs
    used = {"train": len(parts.train), "val": len(parts.validation)}
    session.recorder.record["data"].update(path=inputs.config.data.output_dir, used=used)
    session.recorder.write(**describe_attempt(inputs.config, inputs.device, parts.model))


def _plan(session: Session, parts: Parts) -> StepPlan:
    """How a step is computed on this GPU; its questions may not change from one attempt to the next."""
    inputs, record = session.inputs, session.recorder.record
    plan = plan_step(inputs.config, parts.model, inputs.device, parts.train.lengths, gpus=distributed.count())
    if session.resume_from:
        check_same_steps(session.run, inputs.config, plan, record.get("step", {}))
    say(str(plan) if distributed.count() == 1 else f"{distributed.count()} processes, each with {plan}")
    session.recorder.planned(plan)
    return plan


def _trainer(session: Session, parts: Parts, plan: StepPlan, hooks: Hooks) -> AnswerTrainer:
    config, device = session.inputs.config, session.inputs.device
    validates = bool(config.training.eval_steps and len(parts.validation))
    scratch = distributed.from_first(lambda: scratch_folder(session.recorder.record["run_id"]))
    arguments = trainer_arguments(
        config.training, device, plan, checkpoints=scratch, run_name=session.run.path.name, validates=validates
    )
    trainer = build_trainer(
        arguments,
        parts.model,
        parts.tokenizer,
        parts.train,
        parts.validation if validates else None,
        config.training,
        device,
        plan,
        hooks,
    )
    distributed.draw_apart(config.training.seed)
    distributed.same_everywhere(trainer.stepper.adapters.parameter.data)
    return trainer


def _saver(session: Session) -> Saver:
    store = store_of(session.run, session.inputs.config, session.recorder.record["run_id"])

    def committed(done: Committed) -> None:
        session.stop.save_took(done.seconds)
        session.spending.note("commit", step=done.step, seconds=round(done.seconds, 3), bytes=done.bytes)
        session.recorder.committed(done.folder)

    return Saver(store, say, committed)


def _before(session: Session, trainer: AnswerTrainer, plan: StepPlan) -> BeforeFirstStep:
    """Before the first step: what was loaded is proven to be what trains, and on a GPU the largest micro-batch is tried."""

    def go_on() -> None:
        if session.resume_from:
            check_resumed(trainer, session.resume_from)
            trainer.go_on_with_window(json.loads((session.resume_from / WINDOW).read_text(encoding="utf-8")))

    actions = [go_on]
    if rehearses(trainer.args.device):
        actions.append(lambda: rehearse(trainer, plan, trainer.train_examples))
    return BeforeFirstStep(*actions)


def rehearses(device: torch.device) -> bool:
    return device.type != "cpu"


def rehearse(trainer: AnswerTrainer, plan: StepPlan, train: Examples) -> None:
    """The largest micro-batch comes first, with gradients that are thrown away: memory that does not suffice shows after
    seconds, not after hours."""
    worst = worst_micro_batch(
        train.lengths, plan.limits, plan.rows, questions=plan.questions, padded=plan.path == "stock"
    )
    trainer.model.train()
    trainer.stepper.rehearse([train[index] for index in worst])


def _train(session: Session, trainer: AnswerTrainer, snapshots: Snapshots) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    except StepAbandoned:
        say("the step in progress would end too late: saving the state before it")
        if trainer.save_step_before():
            snapshots.hand_over(trainer.state)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def _committed(session: Session, saver: Saver, snapshots: Snapshots) -> None:
    """Wait for the last save to be a checkpoint; after a request to stop, say how long it took from there."""
    done = saver.finish()
    if done:
        snapshots.saves.committed.append(done)
    request, waited = session.stop.first, session.stop.waited()
    if request and waited is not None and done:
        say(f"the checkpoint of step {done.step} is committed, {waited:.1f} s after {request.detail}")
        session.recorder.write(stop={"reason": request.reason, "detail": request.detail, "seconds": round(waited, 2)})


def _finish(session: Session, trainer: AnswerTrainer, parts: Parts, ends: EndOfStep) -> int:
    """Save the adapter unless the run is to go on, close the record, say how it ended; returns the exit code."""
    done = trainer.state.global_step >= trainer.state.max_steps
    status = "done" if done else "budget_stop" if ends.budget_stop else "interrupted"
    if status != "interrupted" and distributed.first():
        save_adapter(session.run, trainer.model, parts, session.inputs.template)
    return _close(session, status, trainer.state.global_step)


def _refused(session: Session, refusal: str, before: str | None) -> int:
    """The budget does not pay for another save. What an earlier attempt has learned becomes the adapter, and the run has stopped
    at its budget. Raises UserError where somebody wants more of it all the same, and where nothing was learned yet.

    before: the status that the attempt before this one has left.
    """
    step = _step_of(session)
    if step is None or (
        before == "budget_stop" and distributed.from_first(lambda: adapter_is_of(session.run, session.recorder, step))
    ):
        if not _remove_unbegun(session) and before != "budget_stop" and distributed.first():
            session.spending.book("failed")
            session.recorder.close("failed")
        raise UserError(f"{session.run.path}: {refusal} (in {session.run.config_yaml})", code="budget.exhausted")
    say(refusal)
    if distributed.first():
        session.spending.book("budget_stop")
        assert session.resume_from
        adapter_from(session.run, session.resume_from)
        session.recorder.write(stop={"reason": "budget", "detail": refusal, "seconds": 0.0})
    return _close(session, "budget_stop", step)


def _close(session: Session, status: str, step: int) -> int:
    session.spending.end(status)
    session.recorder.close(status, **({} if status == "interrupted" else {"adapter_step": step}))
    tell_end(session.run, status, step)
    return EXIT_TRANSIENT if status == "interrupted" else EXIT_OK


def _close_failed(session: Session, error: BaseException) -> None:
    """Leave a run folder that says how the run ended, without half an adapter; none at all if the run never began."""
    if not distributed.first():
        return
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    try:
        if _remove_unbegun(session):
            return
        remove_halves(session.run)
        session.spending.end(status)
        session.recorder.close(status)
    except (OSError, UserError) as another:  # the fault that brought us here is the one to report
        say(str(another))


def _remove_unbegun(session: Session) -> bool:
    """A new run for which nothing was loaded yet leaves no folder behind; returns whether this is one."""
    unbegun = session.attempt == 1 and "hardware" not in session.recorder.record
    if unbegun and distributed.first():
        shutil.rmtree(session.run.path, ignore_errors=True)
        with suppress(OSError):
            session.run.path.parent.rmdir()  # unless there is something else in it
    return unbegun


def _step_of(session: Session) -> int | None:
    return int(read_manifest(session.resume_from)["step"]) if session.resume_from else None
