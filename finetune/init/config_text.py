"""The config of a new project: the chosen values, each with why it was chosen."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Literal

from finetune.evaluation.statistics import wilson_interval
from finetune.stage_end.following import OF_PROJECT

Goal = Literal["cheap", "fast"]
CONFIG = OF_PROJECT
CHARACTERS_PER_TOKEN, LEAST_CHARACTERS_PER_TOKEN = 3.0, 2.2
"""Of prompt and answer with the schema as `compact`, in the tokens of Mistral-7B-v0.1: measured on 6,077 training questions of
Spider (2026-12-01). Their mean is 2.99; of one in a hundred it is less than 2.21."""
SPIDER_TOKENS = 246
"""Mean tokens of those examples: what is assumed of pairs that do not exist yet."""
FEW = 1000
"""Below so many pairs, a larger share of them is held out, because a score of few questions says little."""
LENGTHS = (2048, 4096, 8192)
TASKS: dict[Goal, str] = {"cheap": "sky/train_cheapest.yaml", "fast": "sky/train_h100.yaml"}


@dataclass(frozen=True)
class Settings:
    """sources: entries of data.sources in YAML. records: pairs in all, questions: of the test set's own source; None if unknown.
    mean_tokens, longest: of prompt and answer, estimated; None if unknown. notes: about the data, a line each.
    figures: the estimate, in lines. assumed: whether `records` is a guess."""

    name: str
    goal: Goal
    sources: tuple[str, ...]
    records: int | None
    has_test: bool
    executable: bool
    by_database: bool = False
    questions: int | None = None
    mean_tokens: float | None = None
    longest: float | None = None
    notes: tuple[str, ...] = ()
    figures: str = ""
    assumed: bool = False

    @property
    def fractions(self) -> tuple[float, float]:
        """Of val and test."""
        if self.has_test:
            return 0.03, 0.0
        if not self.executable:
            return 0.1, 0.02  # nothing is scored, and a test set must not be empty
        return (0.1, 0.2) if self.records is not None and self.records < FEW else (0.05, 0.1)

    @property
    def max_seq_length(self) -> int:
        return next((length for length in LENGTHS if (self.longest or 0) <= length), LENGTHS[-1])


def config_text(settings: Settings, version: str) -> str:
    val, test = settings.fractions
    return f"""\
# finetune data prepare {CONFIG}
# finetune plan {CONFIG}
# finetune launch {TASKS[settings.goal]}      (or on a machine with an NVIDIA GPU: finetune train {CONFIG})
#
# Written by `finetune init` {version} for {settings.name}, --goal {settings.goal}. It is yours to change;
# `finetune config {CONFIG}` prints every key, those with their default, too.
{_comment(settings.figures)}
model:
  name: mistralai/Mistral-7B-v0.1   # the 7B model whose memory, speed and price per run are known to `finetune plan`
  revision: 27d67f1b5f57dc0953326b2601d68371d40ea8da
  max_seq_length: {settings.max_seq_length}       # tokens of prompt and answer{_longest(settings)}
  torch_dtype: auto          # bfloat16 on A100, H100 and L4, float16 on T4 and V100

quantization:                # 4 bits: the 7B model takes 4 GB of GPU memory instead of 14, so that the cheapest GPUs can train it
  load_in_4bit: true
  bnb_4bit_quant_type: nf4
  bnb_4bit_use_double_quant: true

lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05

data:
  sources:
{_sources(settings)}
  output_dir: data/prepared/{settings.name}
  val_fraction: {val:<12g} # of the pairs, for the loss while it trains
  test_fraction: {test:<11g} # {_test_note(settings, test)}
{_split_by(settings)}  schema_format: compact     # one line a table, not CREATE TABLE: about half the tokens and hours

training:
  output_dir: runs
  num_train_epochs: 3
  effective_batch_size: 16   # examples per optimizer step
  per_device_train_batch_size: auto   # micro-batches of as many tokens as the GPU's memory holds
  learning_rate: 2.0e-4
  optim: paged_adamw_8bit
  gradient_checkpointing: auto   # for as few layers as memory allows
  eval_steps: {_eval_steps(settings)}

checkpoint:
  every_minutes: 10          # of training, which a preempted spot machine may lose
  keep_last: 2

plan:                        # what `finetune plan` assumes until `finetune data prepare` has counted
{_plan(settings)}
tracking:
  wandb: auto                # online if a key is found

evaluation:
  split: test
  max_new_tokens: 256
"""


def interval_points(questions: int) -> float:
    """Percentage points to either side of a score of 50%, with 95% certainty (Wilson)."""
    low, high = wilson_interval(questions // 2, questions)
    return 100 * (high - low) / 2


def _comment(text: str) -> str:
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, 118, drop_whitespace=True, subsequent_indent="  ")
    ]
    return "".join(f"#{' ' * bool(line)}{line}\n" for line in ["", *lines]) if lines else ""


def _longest(settings: Settings) -> str:
    if settings.longest is None:
        return "; longer examples are left out of training, and counted"
    return f"; the longest pair has at most about {math.ceil(settings.longest):,} (estimated from its characters)"


def _sources(settings: Settings) -> str:
    return "\n".join([*(f"    # {note}" for note in settings.notes), *(f"    - {entry}" for entry in settings.sources)])


def _test_note(settings: Settings, fraction: float) -> str:
    if not settings.executable:
        return "of the pairs; not scored, because there is no database to execute SQL on"
    questions = settings.questions if settings.has_test else settings.records and round(fraction * settings.records)
    what = "the test questions have their own source" if settings.has_test else "of the pairs, for the score"
    if not questions:
        return what
    points = interval_points(questions)
    return f"{what}: about {questions:,} questions, so 50% right means 50% plus or minus {points:.0f} points (95%)"


def _split_by(settings: Settings) -> str:
    return (
        "  split_by: database         # the score is of databases that the model has not seen\n"
        if settings.by_database
        else ""
    )


def _eval_steps(settings: Settings) -> str:
    steps = None if settings.records is None else 3 * settings.records / 16
    every = 200 if steps is None or steps > 600 else max(5, round(steps / 6))
    return f"{every:<14} # optimizer steps between two validation losses"


def _plan(settings: Settings) -> str:
    lines = []
    if settings.assumed and settings.records is not None:
        lines.append(
            f"  records: {round(0.7 * settings.records):<17} # pairs to train on, assumed until the form is filled in"
        )
        lines.append(f"  questions: {round(0.2 * settings.records):<15} # to score, assumed")
    elif settings.has_test and settings.records is not None:
        lines.append(f"  records: {round(settings.records * (1 - settings.fractions[0])):<17} # pairs to train on")
        lines.append(f"  questions: {settings.questions:<15} # to score")
    tokens = settings.mean_tokens
    why = "estimated from the characters of your pairs" if tokens else "as measured on Spider's"
    lines.append(f"  mean_tokens: {tokens or SPIDER_TOKENS:<13.0f} # prompt and answer of one example, {why}")
    return "\n".join(lines) + "\n"
