"""One training run, from a config to an adapter: `start` and `resume` read as the list of their steps."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from finetune import checkpoint
from finetune.callbacks import Budget, CommitCheckpoints, History, ProgressBar, StopSignals, Throughput
from finetune.cloud.instance import MachinePrice, machine_price
from finetune.config import BudgetSection, RunConfig, TrackingSection, config_hash, to_dict
from finetune.credentials import wandb_key_present
from finetune.data import Prepared, load_prepared
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.files import disk_error
from finetune.model import Device, attach_lora, choose_device, load_base, load_tokenizer
from finetune.prompts import PromptTemplate
from finetune.records import Split
from finetune.run_record import RunRecorder, describe_hardware, describe_model, new_record
from finetune.runs import RunFolder, check_name_is_free, create_run
from finetune.trainer import AnswerTrainer, Examples, build_trainer, tokenise, trainer_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
TEMPORARY_ADAPTER = ".adapter.tmp"


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, checked."""

    config: RunConfig
    device: Device
    data: Prepared
    template: PromptTemplate
    price: MachinePrice | None


@dataclass(frozen=True)
class Parts:
    """What the trainer is built from, in memory."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: Examples
    model: PeftModel


@dataclass(frozen=True)
class Session:
    """What one attempt of a run works with."""

    run: RunFolder
    inputs: Inputs
    parts: Parts
    recorder: RunRecorder
    resume_from: Path | None = None


def start(config: RunConfig, config_file: Path) -> int:
    """Begin a new run in a new folder; returns the exit code.

    Raises UserError for what no run can begin with; the folder is made after everything is loaded, so none is left behind.
    """
    began = time.monotonic()
    check_name_is_free(config.training)
    inputs = _inputs(config)
    parts = _load(inputs)
    run = create_run(config, config_file)
    record = new_record(run, config, config_file, inputs.data, inputs.template)
    return _attempt(Session(run, inputs, parts, RunRecorder(run, record, inputs.price, began)))


def resume(run: RunFolder) -> int:
    """Go on with a run from its newest valid checkpoint, with the config in its folder; returns the exit code.

    Budget, tracking, checkpointing, evaluation and the place of the data may have been changed there since. Raises UserError
    for other changes, for other data, and for a run that is done or has no budget left.
    """
    began = time.monotonic()
    config, record = run.config(), run.record()
    _check_unfinished(run, config, record)
    inputs = _inputs(config)
    found = _newest_checkpoint(run, inputs)
    parts = _load(inputs)
    record.update(attempts=record.get("attempts", 1) + 1, config=to_dict(config), config_hash=config_hash(config))
    return _attempt(Session(run, inputs, parts, RunRecorder(run, record, inputs.price, began), found))


def _check_unfinished(run: RunFolder, config: RunConfig, record: dict[str, Any]) -> None:
    if record.get("status") == "done":
        raise UserError(
            f"{run.path}: this run is done; start a new one, or score it with `finetune evaluate {run.path}`"
        )
    spent = float(record["wall_seconds"])
    if record.get("status") == "budget_stop" and _budget(config, _price(config.budget), spent).seconds <= 0:
        raise UserError(
            f"{run.path}: the budget of this run is used up; raise budget.max_hours or budget.max_run_usd in "
            f"{run.config_yaml} to go on with it"
        )


def _inputs(config: RunConfig) -> Inputs:
    _check_tracking(config.tracking)
    price = _price(config.budget)
    device = choose_device(config.model.torch_dtype)
    if device.place.type == "cpu" and config.training.optim in GPU_OPTIMIZERS:
        raise UserError(f"training.optim: {config.training.optim} needs a GPU; on a CPU use training.optim=adamw_torch")
    data = load_prepared(Path(config.data.output_dir))
    template = PromptTemplate(config.data.schema_format)
    if data.manifest["prompt"] != template.identity():
        raise UserError(
            f"{data.folder}: was prepared for prompt {data.manifest['prompt']}, this config renders "
            f"{template.identity()}; run `finetune data prepare CONFIG` again"
        )
    return Inputs(config, device, data, template, price)


def _price(budget: BudgetSection) -> MachinePrice | None:
    """What the machine costs: by the launch policy's price table, else by the config. Raises UserError where a ceiling in
    dollars has no price to be held by."""
    price = machine_price()
    if price is None and budget.usd_per_hour is not None:
        price = MachinePrice(budget.usd_per_hour, "budget.usd_per_hour of the config")
    if price is None and budget.max_run_usd is not None:
        raise UserError(
            "budget.max_run_usd: the price of this machine is not known (no launch policy started it); set budget.usd_per_hour"
        )
    return price


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


def _load(inputs: Inputs) -> Parts:
    from transformers import set_seed

    tokenizer = load_tokenizer(inputs.config.model)
    train, validation = _examples(inputs, tokenizer, "train"), _examples(inputs, tokenizer, "val")
    set_seed(inputs.config.training.seed)  # before the adapters are drawn
    base = load_base(inputs.config.model, inputs.config.quantization, inputs.device)
    base.config.use_cache = False
    return Parts(tokenizer, train, validation, attach_lora(base, inputs.config.lora))


def _examples(inputs: Inputs, tokenizer: PreTrainedTokenizerBase, split: Split) -> Examples:
    limit = inputs.config.model.max_seq_length
    examples = tokenise(inputs.data.records(split), inputs.template, tokenizer, limit)
    if examples.too_long:
        say(f"{split}: {examples.too_long} examples are longer than model.max_seq_length={limit} tokens and left out")
    if split == "train" and not len(examples.dataset):
        raise UserError(f"model.max_seq_length: no training example fits into {limit} tokens")
    return examples


def _attempt(session: Session) -> int:
    recorder, inputs, parts = session.recorder, session.inputs, session.parts
    used = {"train": len(parts.train.dataset), "val": len(parts.validation.dataset)}
    recorder.record["data"].update(path=inputs.config.data.output_dir, used=used)
    try:
        recorder.write(
            status="running",
            ended_at=None,
            hardware=describe_hardware(inputs.device),
            model=describe_model(inputs.config, parts.model),
        )
        return _fit(session)
    except BaseException as error:
        foreseeable = _foreseeable(error, session.run.path)
        _close_failed(session, error)
        if foreseeable:
            raise foreseeable from error
        raise


def _fit(session: Session) -> int:
    config, parts, recorder = session.inputs.config, session.parts, session.recorder
    throughput = Throughput()
    validates = bool(config.training.eval_steps and len(parts.validation.dataset))
    arguments = trainer_arguments(
        config.training,
        session.inputs.device,
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
    )
    history = History(lambda rows: recorder.progress(trainer.state, throughput, rows))
    budget = _budget(config, session.inputs.price, float(recorder.record["wall_seconds"]))
    with StopSignals(say) as signals, ProgressBar(history) as bar:
        for callback in (history, bar, signals, budget, _committer(session)):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    recorder.progress(trainer.state, throughput, history.rows)
    return _finish(session, trainer, budget)


def _budget(config: RunConfig, price: MachinePrice | None, seconds_before: float) -> Budget:
    return Budget(
        max_hours=config.budget.max_hours,
        max_run_usd=config.budget.max_run_usd,
        usd_per_hour=price.usd_per_hour if price else None,
        seconds_before=seconds_before,
    )


def _committer(session: Session) -> CommitCheckpoints:
    return CommitCheckpoints(
        session.run.checkpoints,
        keep_last=session.inputs.config.checkpoint.keep_last,
        config_hash=_deciding_hash(session.inputs.config),
        data_hash=session.inputs.data.manifest_hash,
    )


def _finish(session: Session, trainer: AnswerTrainer, budget: Budget) -> int:
    """Save the adapter unless the run is to go on, close the record, say how it ended; returns the exit code."""
    run = session.run
    done = trainer.state.global_step >= trainer.state.max_steps
    status = "done" if done else "budget_stop" if budget.exhausted else "interrupted"
    if status != "interrupted":
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
            "out of GPU memory: lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as "
            "much, set training.gradient_checkpointing=true, or lower model.max_seq_length"
        )
    torch_write = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20
    if torch_write or "No space left" in str(error):
        return disk_error(OSError(errno.ENOSPC, str(error)), folder)
    return None


def _close_failed(session: Session, error: BaseException) -> None:
    """Leave a run folder that says how the run ended, without halves of a save; none at all if the run never began."""
    try:
        checkpoint.remove_leftovers(session.run.checkpoints)
        shutil.rmtree(session.run.path / TEMPORARY_ADAPTER, ignore_errors=True)
        session.recorder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    except (OSError, UserError) as another:  # the fault that brought us here is the one to report
        say(str(another))
        if not session.run.run_json.exists():
            shutil.rmtree(session.run.path, ignore_errors=True)


def _check_tracking(tracking: TrackingSection) -> None:
    if tracking.wandb == "online" and not wandb_key_present():
        raise UserError("tracking.wandb: online needs a key; set WANDB_API_KEY or run `wandb login`, or use offline")


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


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # on a line of its own, also while a bar is shown
