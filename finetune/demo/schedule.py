"""How much of the demo fits into its minutes, calculated from the measured speed."""

from __future__ import annotations

from dataclasses import dataclass

SCORING_SHARE = 0.35
"""Share of the remaining time for the answers of both models; training gets the rest."""
TUNED_SHARE = 0.52
"""Time of the tuned model for the same questions, relative to the base model: its answers end early, the base model's continue to
the maximum number of tokens. Measured on two cores: 7.6 of 14.9 s for 48 questions."""
LEAST_QUESTIONS, LEAST_STEPS = 20, 10
"""Minimum for a meaningful demo, done however long it takes."""


VALIDATION_SHARE = 0.5
"""Time of a validation example relative to a training example: no backward pass, its own batches. Measured: 0.5."""
MOST_VALIDATION = 0.05
"""Largest share of the training time for one validation; if it would take more, there is none."""
LEAST_POINTS = 20
"""Points of a curve, below which neither its course nor the highest learning rate is seen."""
REPORT_SECONDS = 5.0
"""Measured: 3 s on two cores."""


@dataclass(frozen=True)
class Pace:
    """The measured speed of this machine, in seconds of wall time.

    step_seconds: one optimizer step of training. question_seconds: the base model's answer to one question, at full length.
    load_seconds: loading the model from disk. threads: the number of torch threads with which the step was fastest.
    """

    step_seconds: float
    question_seconds: float
    load_seconds: float
    threads: int


@dataclass(frozen=True)
class Training:
    """steps: optimizer steps. eval_steps: steps between validations; 0: no validation."""

    steps: int
    eval_steps: int


def questions_that_fit(seconds: float, pace: Pace, most: int) -> int:
    """Number of questions for both models, given the `seconds` left for scoring and training."""
    both = pace.question_seconds * (1 + TUNED_SHARE)
    return _clamp(LEAST_QUESTIONS, int(SCORING_SHARE * seconds / both), most)


def training_that_fits(
    seconds: float, pace: Pace, base_seconds: float, *, most: int, validation_steps: float, eval_steps: int
) -> Training:
    """Training in the `seconds` left after the base model's answers, which took `base_seconds`.

    most: steps of the whole training set. validation_steps: examples of a validation, divided by those of an optimizer step.
    eval_steps: from the config. The model is still loaded twice: for training and for the tuned model's answers.
    """
    left = seconds - TUNED_SHARE * base_seconds - 2 * pace.load_seconds - REPORT_SECONDS
    validation = VALIDATION_SHARE * validation_steps * pace.step_seconds
    if not eval_steps or validation > MOST_VALIDATION * left:
        return Training(_clamp(LEAST_STEPS, int(left / pace.step_seconds), most), 0)
    every = pace.step_seconds + validation / eval_steps
    return Training(_clamp(LEAST_STEPS, int((left - validation) / every), most), eval_steps)


def steps_between_logs(steps: int, configured: int) -> int:
    """training.logging_steps of a run of so many steps: as configured, or fewer, so that its curves have LEAST_POINTS if it has
    as many steps. What is logged changes nothing that is trained."""
    return _clamp(1, steps // LEAST_POINTS, configured)


def _clamp(least: int, value: int, most: int) -> int:
    return min(max(value, least), most)
