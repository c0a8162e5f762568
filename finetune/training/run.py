"""One training run, from a config to an adapter: `start` begins it, `resume` continues it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import torch
from transformers import TrainerCallback

from finetune.budget.lease import Lease
from finetune.budget.run_budget import book_refused, open_budget
from finetune.budget.takeover import Heritage
from finetune.checkpoint.async_writer import AsyncCheckpointWriter, Committed
from finetune.checkpoint.folders import read_manifest
from finetune.config.load import config_hash, load_config, to_dict
from finetune.config.schema import RunConfig
from finetune.data.tokenize import Examples
from finetune.errors import EXIT_OK, UserError
from finetune.machine import set_up
from finetune.run_folder import RunFolder, check_name_is_free, create_run
from finetune.run_record import RunRecord
from finetune.runtime import distributed, process_group
from finetune.runtime.console import say
from finetune.runtime.stop_request import Stop, StopSignals
from finetune.training.adapter import save_adapter
from finetune.training.agreement import check_agreement
from finetune.training.arguments import trainer_arguments
from finetune.training.callbacks import AfterFirstStep, BeforeFirstStep, History, ProgressBar, Throughput
from finetune.training.ending import (
    already_there,
    clean_up,
    close,
    failures_recorded,
    refused,
    stop_hanging,
    taken_over_first,
)
from finetune.training.first_step import end_part, first_step_done
from finetune.training.record.measurements import peak_memory
from finetune.training.record.recorder import RunRecorder, new_record
from finetune.training.resume import (
    check_numbers,
    check_same_steps,
    check_unfinished,
    id_of,
    keep_threads,
    newest_checkpoint,
    set_ceilings,
    store_of,
)
from finetune.training.save_policy import EndOfStep, StepAbandoned
from finetune.training.saved_files import read_logging_state
from finetune.training.scratch import remove_if_empty, scratch_folder
from finetune.training.session import Session
from finetune.training.setup import Inputs, Parts, inputs_of, load_parts
from finetune.training.staging import LOGGING_STATE, CheckpointStaging, check_resumed, remove_half_saves
from finetune.training.step.plan import StepPlan, plan_step, worst_micro_batch
from finetune.training.tracking.trackers import end_trackers, trackers
from finetune.training.trainer import AnswerTrainer, Hooks, build_trainer

RECENTLY_SECONDS = 1.0
"""run.json is written at every log: a look at the lease that is so recent is enough for that."""


def start(
    config: RunConfig,
    config_file: Path,
    stop_step: int | None = None,
    *,
    created: Callable[[RunFolder], object] = lambda run: None,
) -> int:
    """Begin a new run in a new folder; returns the exit code. Under torchrun every process calls it. stop_step: pause after it.
    created: is told the folder.

    Raises UserError for inputs that no run can start with; no folder is left behind then.
    """
    began = time.monotonic()
    with process_group.process_group():
        end_part(set_up.IMPORTS)
        distributed.run_on_rank0(lambda: check_name_is_free(config.training))
        inputs = inputs_of(config)
        check_agreement(inputs)
        with Lease(say) as lease:

            def claim(run: RunFolder) -> None:
                _acquire(lease, run, inputs, lambda: ({}, 0))

            run = distributed.run_on_rank0(lambda: create_run(config, config_file, claim))
            created(run)
            record = new_record(run, config, config_file, inputs.data, inputs.template)
            return _attempt(run, inputs, distributed.run_on_rank0(lambda: record), None, lease, began, stop_step)


def resume(run: RunFolder, ceilings: Mapping[str, float] | None = None, stop_step: int | None = None) -> int:
    """Resume a run from its newest valid checkpoint, with the config in its folder; returns the exit code.

    `resume_rules` defines which keys of the config may have changed. ceilings: keys of the section budget, such as max_run_usd,
    written into that config once all other checks have passed. stop_step: pause after it. Raises UserError for other changes, for
    other data, and for a run that is done or has no budget left.
    """
    began = time.monotonic()
    with process_group.process_group():
        end_part(set_up.IMPORTS)
        typed = [f"budget.{name}={value!r}" for name, value in (ceilings or {}).items()]

        def read() -> tuple[RunConfig, RunRecord]:
            return load_config(run.config_yaml, typed), run.record()

        config, record = distributed.run_on_rank0(read)
        check_unfinished(run, record)
        check_numbers(run, record)
        store_of(run, config, record, Lease(say))  # checks what identifies the run
        inputs = inputs_of(config, resumes=True)
        check_agreement(inputs)
        with Lease(say) as lease:
            store = store_of(run, config, record, lease)
            waited = distributed.run_on_rank0(lambda: _acquire(lease, run, inputs, store.heritage))
            if waited:  # for an attempt that may have gone on, and changed everything
                earlier, (config, record) = config, distributed.run_on_rank0(read)
                if record.status == "done":
                    say(f"{run.path}: done by the attempt that this one has waited for")
                    return EXIT_OK
                inputs = inputs if to_dict(config) == to_dict(earlier) else inputs_of(config, resumes=True)
            check_numbers(run, record)
            keep_threads(record, inputs.device.place)
            store = store_of(run, config, record, lease)
            backend = record.step.backend if record.step else None
            found = distributed.run_on_rank0(lambda: newest_checkpoint(run, store, config, inputs.data, backend))
            if ceilings:
                distributed.run_on_rank0(lambda: set_ceilings(run, config, ceilings, found))
            record.attempts += 1
            record.config, record.config_hash = to_dict(config), config_hash(config)
            return _attempt(run, inputs, record, found, lease, began, stop_step)


def _acquire(lease: Lease, run: RunFolder, inputs: Inputs, heritage: Callable[[], Heritage]) -> bool:
    """Returns whether it had to wait. Raises UserError for a run that another attempt holds."""
    try:
        return lease.acquire(run, heritage)
    except UserError as error:
        if error.code == "run.held":
            book_refused(run, inputs.config, inputs.price)
        raise


def _attempt(
    run: RunFolder,
    inputs: Inputs,
    record: RunRecord,
    found: Path | None,
    lease: Lease,
    began: float,
    stop_step: int | None,
) -> int:
    stop = Stop(say)
    step = read_manifest(found)["step"] if found else 0
    budget = open_budget(run, inputs.config, inputs.price, stop, attempt=record.attempts, step=step)
    recorder, before = RunRecorder(run, record, budget, began, lambda: lease.check(RECENTLY_SECONDS)), record.status
    session = Session(run, inputs, recorder, budget, stop, lease, found, stop_step)
    with failures_recorded(session):
        recorder.resume_from(found)
        process_group.on_failure(lambda code: clean_up(session, code))
        if stop_step is not None and step >= stop_step:
            return already_there(session)
        refusal = distributed.run_on_rank0(budget.refusal_to_start)
        if refusal is None:
            recorder.begin()  # before anything else: a folder without run.json is not a run
            with budget.metered(hard_stop=lambda: _end_hanging(session)), taken_over_first(session):
                end_part(set_up.CHECKS)
                return _fit(session, load_parts(inputs, end_part))
    return refused(session, refusal, before)


def _end_hanging(session: Session) -> None:
    stop_hanging(session.run, session.recorder, session.lease)
    session.lease.release()


def _fit(session: Session, parts: Parts) -> int:
    inputs, recorder, run = session.inputs, session.recorder, session.run
    plan = _plan(session, parts)  # before anything is recorded as loaded: a new run that it refuses leaves no folder
    recorder.loaded(inputs, parts)
    recorder.planned(plan)
    throughput = Throughput()
    ends = EndOfStep(
        session.stop,
        save_steps=inputs.config.checkpoint.save_steps,
        every_minutes=inputs.config.checkpoint.every_minutes,
        stop_step=session.stop_step,
    )

    def between_micro_batches() -> None:
        session.lease.check_pulse()
        ends.abandon_if_too_late()

    def series() -> dict[str, float]:
        return session.budget.series() | {"peak_memory_gib": peak_memory().value}

    hooks = Hooks(throughput, series, between_micro_batches, say)
    trainer = _trainer(session, parts, plan, hooks)
    writer = _writer(session) if distributed.is_rank0() else None
    staging = CheckpointStaging(
        trainer, writer, run, inputs.config, inputs.data, inputs.template, session.record.attempts, session.lease
    )

    def write(_: object = None) -> None:
        recorder.progress(trainer.state, throughput, plan, trainer.stepper, staging.saves)

    history = History(write)
    session.budget.follow(lambda: (trainer.state.global_step, trainer.state.max_steps), throughput.wall_seconds)
    with StopSignals(session.stop), ProgressBar(history, session.budget.short) as bar, session.budget.notices():
        tracking = trackers(inputs.config.tracking, run.path, run.path.name, session.resumed_step, say)
        first = AfterFirstStep(lambda: first_step_done(session))
        for callback in (first, *tracking, history, bar, ends, staging, _before(session, trainer, plan)):
            trainer.add_callback(callback)
        try:
            with closing(writer) if writer else nullcontext():
                _train(session, trainer, staging)
                if writer:
                    _committed(session, writer, staging)
        except BaseException:
            if writer:
                remove_half_saves(Path(trainer.args.output_dir))
            raise
    with suppress(OSError):
        remove_if_empty(Path(trainer.args.output_dir))
    write()
    return _finish(session, trainer, parts, ends, tracking)


def _plan(session: Session, parts: Parts) -> StepPlan:
    """How a step is computed on this GPU. Raises UserError if its examples would differ from those of earlier attempts."""
    inputs, record = session.inputs, session.record
    plan = plan_step(inputs.config, parts.model, inputs.device, parts.train.lengths, gpus=distributed.world_size())
    if session.resume_from:
        check_same_steps(session.run, inputs.config, plan, record.step)
    say(str(plan) if distributed.world_size() == 1 else f"{distributed.world_size()} processes, each with {plan}")
    return plan


def _trainer(session: Session, parts: Parts, plan: StepPlan, hooks: Hooks) -> AnswerTrainer:
    config, device = session.inputs.config, session.inputs.device
    validates = bool(config.training.eval_steps and len(parts.validation))
    scratch = distributed.run_on_rank0(lambda: scratch_folder(id_of(session.run, session.record)))
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
    distributed.seed_per_rank(config.training.seed)
    distributed.broadcast(trainer.stepper.adapters.parameter.data)
    return trainer


def _writer(session: Session) -> AsyncCheckpointWriter:
    store = store_of(session.run, session.inputs.config, session.record, session.lease)

    def committed(done: Committed) -> None:
        session.stop.save_took(done.seconds)
        session.budget.note("commit", step=done.step, seconds=round(done.seconds, 3), bytes=done.bytes)
        session.recorder.committed(done.folder)

    return AsyncCheckpointWriter(store, say, committed)


def _before(session: Session, trainer: AnswerTrainer, plan: StepPlan) -> BeforeFirstStep:
    """Before the first step: check a resumed model against its checkpoint, and on a GPU try the largest micro-batch."""

    def restore() -> None:
        if session.resume_from:
            check_resumed(trainer, session.resume_from)
            trainer.restore_logging_state(vars(read_logging_state(session.resume_from / LOGGING_STATE)))

    actions = [restore]
    if needs_memory_dry_run(trainer.args.device):
        actions.append(lambda: memory_dry_run(trainer, plan, trainer.train_examples))
    return BeforeFirstStep(*actions)


def needs_memory_dry_run(device: torch.device) -> bool:
    return device.type != "cpu"


def memory_dry_run(trainer: AnswerTrainer, plan: StepPlan, train: Examples) -> None:
    """Run the largest micro-batch first and discard its gradients, so that running out of memory shows after seconds, not
    hours."""
    worst = worst_micro_batch(
        train.lengths, plan.limits, plan.micro_batch_size, batch_size=plan.batch_size, padded=plan.backend == "hf"
    )
    trainer.model.train()
    trainer.stepper.memory_dry_run([train[index] for index in worst])


def _train(session: Session, trainer: AnswerTrainer, staging: CheckpointStaging) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    except StepAbandoned:
        say("the step in progress would end too late: saving the state from before it")
        if trainer.save_step_before():
            staging.hand_over(trainer.state)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def _committed(session: Session, writer: AsyncCheckpointWriter, staging: CheckpointStaging) -> None:
    """Wait until the last save is committed; after a request to stop, report the time since the request."""
    done = writer.finish()
    if done:
        staging.saves.committed.append(done)
    request, waited = session.stop.first, session.stop.waited()
    if request and waited is not None and done:
        say(f"the checkpoint of step {done.step} is committed, {waited:.1f} s after {request.detail}")
        session.recorder.stopped(request.reason, request.detail, waited)


def _finish(
    session: Session, trainer: AnswerTrainer, parts: Parts, ends: EndOfStep, tracking: Sequence[TrainerCallback]
) -> int:
    """Save the adapter unless the run is to be resumed, close the record, report the end; returns the exit code."""
    done = trainer.state.global_step >= trainer.state.max_steps
    status = "done" if done else "budget_stop" if ends.budget_stop else "paused" if ends.paused else "interrupted"
    if status != "interrupted" and distributed.is_rank0():
        save_adapter(session.run, trainer.model, parts, session.inputs.template, session.lease.check)
    end_trackers(tracking, status)
    return close(session, status, trainer.state.global_step)
