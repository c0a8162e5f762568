"""Completes a file of answers: those that are kept are told of as new ones are, and only the missing ones are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune.evaluation.answers import AnswerFile, prompts_hash
from finetune.evaluation.cost import Load, noting
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.questions import short_hash
from finetune.machine.price import MachinePrice
from finetune.runtime.console import say

Price = Callable[[], MachinePrice | None]
"""Of this machine (cost.evaluation_price), called once a model is loaded."""


def answers_key(settings: dict[str, Any], prompts: Sequence[str]) -> str:
    """A hash of everything that answers depend on, for the name of their file."""
    return short_hash([settings, prompts_hash(prompts)])


def complete(
    answers: AnswerFile,
    load: Load,
    price: Price,
    *,
    tuned: bool,
    max_new_tokens: int,
    progress: bool,
    told: Callable[[int, Answer], None],
) -> None:
    """told: called with each answer and its number, kept or new. The others as in `AnswerFile.generate`, whose errors it
    raises."""
    if answers.answers:
        say(f"{answers.kept()} are there already; {'judging them' if answers.complete else 'going on there'}")
    for number, answer in answers.answers.items():
        told(number, answer)
    answers.generate(
        noting(answers, load, price), tuned=tuned, max_new_tokens=max_new_tokens, progress=progress, told=told
    )
