"""What a reader must know before quoting a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.evaluation.score import CAN_TELL, Row
from finetune.evaluation.statistics import FEW_DATABASES
from finetune.report.caveats import FEW_QUESTIONS
from finetune.report.compared import Common, Compared
from finetune.sql.gold import WITHOUT_RESULT


def notes(compared: Sequence[Compared], common: Common, rows: Sequence[Sequence[Row]]) -> list[str]:
    """One sentence each. rows: of each model on the common questions."""
    return [
        *common.left_out,
        *_of_prompts(compared),
        *_of_training(compared),
        *_of_questions(compared[0], rows[0]),
        *_of_answers(compared, rows),
        "No figure here accounts for the choice of a training seed.",
    ]


def _of_prompts(compared: Sequence[Compared]) -> list[str]:
    known = {one.label: one.evaluation.get("prompt_version") for one in compared}
    unknown = [label for label, version in known.items() if version is None]
    versions = {label: str(version) for label, version in known.items() if version is not None}
    said = [f"The prompts of {', '.join(unknown)} are not known."] if unknown else []
    if len(set(versions.values())) > 1:
        which = ", ".join(f"{version} ({label})" for label, version in versions.items())
        said.append(f"Other prompts: {which}; the difference is that of model and prompt together.")
    return said


def _of_training(compared: Sequence[Compared]) -> list[str]:
    other = [one.label for one in compared if one.trained_on is not None and one.trained_on != one.data]
    return (
        [f"Trained on other prepared data than these questions: {', '.join(other)}; leaks are possible."]
        if other
        else []
    )


def _of_questions(first: Compared, rows: Sequence[Row]) -> list[str]:
    asked, databases = len(rows), len({row.db_id for row in rows})
    split = first.evaluation.get("split")
    hollow = sum(row.gold_kind not in CAN_TELL and row.gold_kind not in WITHOUT_RESULT for row in rows)
    without = sum(row.gold_kind in WITHOUT_RESULT for row in rows)
    found = [
        (split != "test", f"The questions are from the {split} split, not from the test split."),
        (asked < FEW_QUESTIONS, f"Few questions: each of the {asked} is worth {100 / asked:.1f} points."),
        (
            1 < databases < FEW_DATABASES,
            f"The questions are about {databases} databases; with fewer than {FEW_DATABASES} the interval over databases is "
            "too narrow.",
        ),
        (
            hollow > 0,
            f"Hollow gold queries, which a constant answers or which depend on the time: {hollow} of {asked}.",
        ),
        (without > 0, f"Gold queries without a result: {without}; these questions count as wrong for all."),
    ]
    return [text for holds, text in found if holds]


def _of_answers(compared: Sequence[Compared], rows: Sequence[Sequence[Row]]) -> list[str]:
    said = []
    for one, answers in zip(compared[1:], rows[1:], strict=True):
        same = sum(row.prediction == first.prediction for first, row in zip(rows[0], answers, strict=True))
        said.append(f"{one.label} gives the same SQL as {compared[0].label} to {same} of {len(answers)} questions.")
    return said
