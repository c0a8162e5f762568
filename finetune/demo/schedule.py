"""How much of the demo fits into its minutes: arithmetic on a measured pace, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

SCORING_SHARE = 0.35
"""Of the time that is left, for the answers of both models; training gets the rest."""
TUNED_SHARE = 0.75
"""Of the base model's seconds, what the tuned model needs for the same questions: its answers end, the base model's ramble on
to the last allowed token. Measured on two cores: 16.1 of 21.7 s for 31 questions."""
LEAST_QUESTIONS, LEAST_STEPS = 20, 10
"""Below these a demo shows nothing, so they are done however long they take."""


VALIDATION_SHARE = 0.5
"""Of a training example's seconds, what a validation example takes: no backward pass, batches of its own. Measured: 0.5."""
MOST_VALIDATION = 0.05
"""Of the time for training, what a validation may take; where it takes more there is none."""
REPORT_SECONDS = 5.0
"""Measured: 3 on two cores."""


@dataclass(frozen=True)
class Pace:
    """What this machine takes, measured. Seconds of wall time.

    step_seconds: an optimizer step of training. question_seconds: the base model's answer to one question, at its full length.
    load_seconds: a model from the disk. threads: torch's, with which the step was fastest.
    """

    step_seconds: float
    question_seconds: float
    load_seconds: float
    threads: int


@dataclass(frozen=True)
class Training:
    """steps: optimizer steps. eval_steps: between two validations; 0: none."""

    steps: int
    eval_steps: int


def questions_that_fit(seconds: float, pace: Pace, most: int) -> int:
    """How many questions both models are asked, from `seconds` that are left for scoring and training."""
    both = pace.question_seconds * (1 + TUNED_SHARE)
    return _between(LEAST_QUESTIONS, int(SCORING_SHARE * seconds / both), most)


def training_that_fits(
    seconds: float, pace: Pace, base_seconds: float, *, most: int, validation_steps: float, eval_steps: int
) -> Training:
    """From the `seconds` that are left after the base model's answers, which took `base_seconds`.

    most: steps of the whole training set. validation_steps: the examples of a validation, in optimizer steps of as many.
    eval_steps: of the config. Two loads are still to come: for training and for the tuned model's answers.
    """
    left = seconds - TUNED_SHARE * base_seconds - 2 * pace.load_seconds - REPORT_SECONDS
    validation = VALIDATION_SHARE * validation_steps * pace.step_seconds
    if not eval_steps or validation > MOST_VALIDATION * left:
        return Training(_between(LEAST_STEPS, int(left / pace.step_seconds), most), 0)
    every = pace.step_seconds + validation / eval_steps
    return Training(_between(LEAST_STEPS, int((left - validation) / every), most), eval_steps)


def _between(least: int, wanted: int, most: int) -> int:
    return min(max(wanted, least), most)
