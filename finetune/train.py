"""One training run, from a config to an adapter: `start` and `resume` read as the list of their steps."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import checkpoint
from finetune.callbacks import Budget, CommitCheckpoints, History, ProgressBar, StopSignals, Throughput
from finetune.config import RunConfig, TrackingSection, config_hash
from finetune.credentials import wandb_key_present
from finetune.data import Prepared, load_prepared
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.files import disk_error
from finetune.model import Device, attach_lora, choose_device, load_base, load_tokenizer
from finetune.prompts import PromptTemplate
from finetune.records import Split
from finetune.run_record import RunRecorder, describe_hardware, describe_model, new_record
from finetune.runs import RunFolder, create_run
from finetune.trainer import AnswerTrainer, Examples, build_trainer, tokenise, trainer_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


@dataclass(frozen=True)
class Session:
    """What one attempt of a run works with."""

    run: RunFolder
    config: RunConfig
    data: Prepared
    device: Device
    template: PromptTemplate
    recorder: RunRecorder
    resume_from: Path | None = None


def start(config: RunConfig, config_file: Path) -> int:
    """Begin a new run in a new folder; returns the exit code. Raises UserError for what no run can begin with."""
    device, data, template = _inputs(config)
    tokenizer = load_tokenizer(config.model)  # before the folder is made: a wrong model name leaves nothing behind
    run = create_run(config, config_file)
    record = new_record(run, config, config_file, data, template)
    recorder = RunRecorder(run, record, config.budget.usd_per_hour)
    return _attempt(Session(run, config, data, device, template, recorder), tokenizer)


def resume(run: RunFolder) -> int:
    """Go on with a run from its newest valid checkpoint, with the config in its folder; returns the exit code."""
    config, record = run.config(), run.record()
    if record.get("status") == "done":
        raise UserError(
            f"{run.path}: this run is done; start a new one, or score it with `finetune evaluate {run.path}`"
        )
    device, data, template = _inputs(config)
    tokenizer = load_tokenizer(config.model)
    found, skipped = checkpoint.latest_valid(run.checkpoints)
    for item in skipped:
        say(f"passed over {item.folder}: {item.reason}")
    if found is None:
        say(f"{run.path}: no checkpoint yet, starting from the beginning")
    else:
        checkpoint.check_same_run(found, config_hash=config_hash(config), data_hash=data.manifest_hash)
        say(f"resuming from {found}")
    checkpoint.remove_leftovers(run.checkpoints)
    record["attempts"] = record.get("attempts", 1) + 1
    recorder = RunRecorder(run, record, config.budget.usd_per_hour)
    return _attempt(Session(run, config, data, device, template, recorder, found), tokenizer)


def _inputs(config: RunConfig) -> tuple[Device, Prepared, PromptTemplate]:
    """Device, data and prompt template, checked before anything is written."""
    _check_tracking(config.tracking)
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
    return device, data, template


def _attempt(session: Session, tokenizer: PreTrainedTokenizerBase) -> int:
    recorder = session.recorder
    try:
        recorder.write(status="running", hardware=describe_hardware(session.device))
        train, validation = _examples(session, tokenizer, "train"), _examples(session, tokenizer, "val")
        model = _model(session)
        recorder.write(model=describe_model(session.config, model))
        return _fit(session, model, tokenizer, train, validation)
    except OSError as error:
        _close_failed(recorder)
        raise disk_error(error, session.run.path) from error
    except BaseException:
        _close_failed(recorder)
        raise


def _examples(session: Session, tokenizer: PreTrainedTokenizerBase, split: Split) -> Examples:
    limit = session.config.model.max_seq_length
    examples = tokenise(session.data.records(split), session.template, tokenizer, limit)
    if examples.too_long:
        say(f"{split}: {examples.too_long} examples are longer than model.max_seq_length={limit} tokens and left out")
    if split == "train" and not len(examples.dataset):
        raise UserError(f"model.max_seq_length: no training example fits into {limit} tokens")
    session.recorder.record["data"].setdefault("used", {})[split] = len(examples.dataset)
    return examples


def _model(session: Session) -> PeftModel:
    from transformers import set_seed

    set_seed(session.config.training.seed)  # before the adapters are drawn
    base = load_base(session.config.model, session.config.quantization, session.device)
    base.config.use_cache = False
    return attach_lora(base, session.config.lora)


def _fit(
    session: Session, model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Examples, validation: Examples
) -> int:
    config, recorder = session.config, session.recorder
    throughput = Throughput()
    validates = bool(config.training.eval_steps and len(validation.dataset))
    arguments = trainer_arguments(
        config.training,
        session.device,
        checkpoints=session.run.checkpoints,
        run_name=session.run.path.name,
        save_steps=config.checkpoint.save_steps,
        report_to=_report_to(session),
        validates=validates,
    )
    trainer = build_trainer(
        arguments, model, tokenizer, train.dataset, validation.dataset if validates else None, throughput
    )
    history = History(lambda rows: recorder.progress(trainer.state, throughput, rows))
    budget = _budget(session)
    with StopSignals(say) as signals:
        for callback in (history, ProgressBar(history), signals, budget, _committer(session)):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    recorder.progress(trainer.state, throughput, history.rows)
    return _finish(session, trainer, tokenizer, budget)


def _budget(session: Session) -> Budget:
    budget = session.config.budget
    return Budget(
        max_hours=budget.max_hours,
        max_run_usd=budget.max_run_usd,
        usd_per_hour=budget.usd_per_hour,
        seconds_before=float(session.recorder.record["wall_seconds"]),
    )


def _committer(session: Session) -> CommitCheckpoints:
    return CommitCheckpoints(
        session.run.checkpoints,
        keep_last=session.config.checkpoint.keep_last,
        config_hash=session.recorder.record["config_hash"],
        data_hash=session.data.manifest_hash,
    )


def _finish(session: Session, trainer: AnswerTrainer, tokenizer: PreTrainedTokenizerBase, budget: Budget) -> int:
    """Save the adapter unless the run is to go on, close the record, say how it ended; returns the exit code."""
    run = session.run
    done = trainer.state.global_step >= trainer.state.max_steps
    status = "done" if done else "budget_stop" if budget.exhausted else "interrupted"
    if status != "interrupted":
        _save_adapter(session, trainer, tokenizer)
    session.recorder.close(status)
    say(
        {
            "done": f"{run.path}: done; the adapter is in {run.adapter}",
            "budget_stop": f"{run.path}: the budget is used up; the adapter of the last step is in {run.adapter}",
            "interrupted": f"{run.path}: interrupted, a checkpoint is saved; go on with `finetune train --resume {run.path}`",
        }[status]
    )
    return EXIT_TRANSIENT if status == "interrupted" else EXIT_OK


def _save_adapter(session: Session, trainer: AnswerTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adapter, tokenizer and prompt template in one folder, which appears whole: it is saved under another name first."""
    temporary = session.run.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.save_pretrained(str(temporary))
    tokenizer.save_pretrained(str(temporary))
    session.template.save(temporary)
    if session.run.adapter.exists():  # of an attempt that stopped at its budget
        shutil.rmtree(session.run.adapter)
    os.replace(temporary, session.run.adapter)


def _close_failed(recorder: RunRecorder) -> None:
    try:
        recorder.close("failed")
    except UserError as error:  # such as a full disk: the fault that brought us here is the one to report
        say(str(error))


def _check_tracking(tracking: TrackingSection) -> None:
    if tracking.wandb == "online" and not wandb_key_present():
        raise UserError("tracking.wandb: online needs a key; set WANDB_API_KEY or run `wandb login`, or use offline")


def _report_to(session: Session) -> list[str]:
    """TensorBoard always; W&B when a key is there or it is asked for."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(session.run.tensorboard)
    wanted = session.config.tracking.wandb
    if wanted == "disabled" or (wanted == "auto" and not wandb_key_present()):
        return ["tensorboard"]
    os.environ["WANDB_MODE"] = "offline" if wanted == "offline" else "online"
    os.environ["WANDB_PROJECT"] = session.config.tracking.wandb_project
    os.environ["WANDB_DIR"] = str(session.run.path)
    return ["tensorboard", "wandb"]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
