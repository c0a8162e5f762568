"""`finetune demo`: prepare, score, train and score again, with as many examples and questions as fit into the given minutes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.budget.lease import clear_not_started
from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig
from finetune.data.prepare import prepare_data
from finetune.demo.pace import measure
from finetune.demo.schedule import questions_that_fit, steps_between_logs, training_that_fits
from finetune.errors import EXIT_OK, UserError
from finetune.evaluation.generators.hf import HfModel
from finetune.evaluation.generators.weights import weights_for
from finetune.evaluation.run import evaluate_base, evaluate_run
from finetune.models.answering import answering_device
from finetune.models.device import Device, choose_device
from finetune.models.load import attach_lora, load_base, load_tokenizer
from finetune.run_folder import RunFolder, open_run
from finetune.runtime.console import say
from finetune.training.resume import keep_threads
from finetune.training.run import resume, start

if TYPE_CHECKING:
    from peft import PeftModel

HF = "hf"
"""The generator for both models: the base model's answers come from the one in memory, where it computes in their dtype."""


def run_demo(config: RunConfig, config_file: Path, deadline: float) -> int:
    """The demo of a config with a `training.run_name`, until about `deadline` (time.monotonic()); returns the exit code.

    An interrupted demo is resumed with its original plan and number of threads. Raises UserError if the config has no run name,
    or a run cannot start with it.
    """
    if not config.training.run_name:
        raise UserError(
            f"{config_file}: training.run_name: the demo needs a name, to find its run again",
            code="demo.no_run_name",
        )
    folder = Path(config.training.output_dir) / config.training.run_name
    clear_not_started(RunFolder(folder), say)
    code = _go_on(open_run(folder)) if folder.exists() else _begin(config, config_file, deadline)
    if code != EXIT_OK:
        return code
    run = open_run(folder)
    if not _is_newer(run.eval_json, run.adapter / "adapter_model.safetensors"):
        evaluate_run(run, generator=HF)
    return EXIT_OK


def _go_on(run: RunFolder) -> int:
    if run.adapter.is_dir():
        say(f"{run.path} is trained already; to start over, rename that folder (`make demo-fresh` does for runs/demo)")
        device = choose_device(run.config().model.torch_dtype).place
        keep_threads(run.record(), device)  # so that missing answers are the same as in an uninterrupted demo
        return EXIT_OK
    return resume(run)


def _begin(config: RunConfig, config_file: Path, deadline: float) -> int:
    """Everything up to the trained adapter. The measured speed determines the number of questions. The time left after the base
    model's answers determines the number of steps, which must be known before the first step because the learning rate schedule
    depends on it."""
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    model, device, load_seconds = _load(config)
    say("measuring this machine's speed, a minute or two")
    began = time.monotonic()
    pace = measure(model, tokenizer, config, data, load_seconds)
    measured = time.monotonic()
    asked = config.evaluation.max_questions or data.manifest["counts"][config.evaluation.split]
    config = _with(config, "evaluation", max_questions=questions_that_fit(deadline - measured, pace, asked))
    say(f"this machine takes {pace.step_seconds:.2f} s for a training step ({pace.threads} threads) and up to "
        f"{pace.question_seconds:.2f} s for an answer (measured for {measured - began:.0f} s): "
        f"{config.evaluation.max_questions} questions fit")  # fmt: skip
    loaded = HfModel(model, tokenizer, device, load_seconds=load_seconds)
    base = evaluate_base(config, loaded=loaded if answering_device(config) == device else None, generator=HF)
    del model, loaded
    counts, examples = data.manifest["counts"], examples_per_step(config.training)
    fitting = training_that_fits(
        deadline - time.monotonic(),
        pace,
        base["seconds"],
        most=max(1, counts["train"] // examples),
        validation_steps=counts["val"] / examples,
        eval_steps=config.training.eval_steps,
    )
    say(f"{fitting.steps} training steps fit: {fitting.steps * examples} of {counts['train']} examples")
    training = {
        "max_steps": fitting.steps,
        "eval_steps": fitting.eval_steps,
        "logging_steps": steps_between_logs(fitting.steps, config.training.logging_steps),
    }
    return start(_with(config, "training", **training), config_file)


def _load(config: RunConfig) -> tuple[PeftModel, Device, float]:
    """The base model with new adapters, where it is, and the seconds that loading took."""
    began = time.monotonic()
    device = choose_device(config.model.torch_dtype)
    dequantize = weights_for(config, device).dequantize
    base = load_base(config.model, config.quantization, device, dequantize=dequantize)
    return attach_lora(base, config.lora), device, time.monotonic() - began


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _is_newer(path: Path, than: Path) -> bool:
    return path.is_file() and path.stat().st_mtime > than.stat().st_mtime
