"""One more try, with the error message, where an answer's SQL does not run.

Whether a question is asked again depends only on what a user would see: an error instead of a result. Wrong rows and empty
results are results, and the gold query plays no part. (Where the gold query itself fails nothing is executed; such a question
counts as wrong whatever the answer, and is not asked again.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from finetune.data.prompts import RETRY_VERSION
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judging import Judging
from finetune.evaluation.samples import compared
from finetune.evaluation.score import Row, as_dict, score, sha256
from finetune.sql.engines.base import ErrorKind

if TYPE_CHECKING:
    from finetune.evaluation.questions import EvaluationSet

DID_NOT_RUN: tuple[str, ...] = get_args(ErrorKind)
"""The verdicts of SQL that gave an error instead of a result."""

Ask = Callable[[int, Sequence[str]], list[Answer]]
"""The answers to the prompts of a round, counted from 1."""


@dataclass(frozen=True)
class Retried:
    """rows: of the last answer to each question. earlier: the rows of its answers before that, the first one first. asked: the
    questions of each round. new_tokens: of all rounds, without the first answers."""

    rows: list[Row]
    earlier: list[list[Row]]
    asked: list[int]
    new_tokens: int

    def lines(self) -> list[dict[str, Any]]:
        """The lines of eval/tuned-retry.jsonl: the last row of each question, and what failed before."""
        return [
            as_dict(row) | {"earlier": [{"prediction": one.prediction, "error": one.error} for one in before]}
            for row, before in zip(self.rows, self.earlier, strict=True)
        ]


def retried_with(round_number: int) -> dict[str, Any]:
    """What the answers of a round depend on besides what first answers do: part of the key of kept ones."""
    return {"version": RETRY_VERSION, "round": round_number}


def retry(questions: EvaluationSet, first: Sequence[Row], ask: Ask, judged: Judging) -> Retried:
    """Ask up to evaluation.retries times. first: the rows of the greedy answers. Every prompt holds all answers before it, with
    their errors. An answer that has a problem (too long, out of memory) changes nothing, and ends that question's tries."""
    rows, prompts = list(first), list(questions.prompts)
    earlier: list[list[Row]] = [[] for _ in rows]
    done, asked, tokens = set[int](), list[int](), 0
    for round_number in range(1, questions.config.evaluation.retries + 1):
        places = [place for place, row in enumerate(rows) if row.verdict in DID_NOT_RUN and place not in done]
        if not places:
            break
        for place in places:
            row = rows[place]
            prompts[place] = questions.template.render_retry(prompts[place], row.prediction, row.error or row.verdict)
        answers = ask(round_number, [prompts[place] for place in places])
        asked.append(len(places))
        tokens += sum(answer.new_tokens for answer in answers)
        for place, answer in zip(places, answers, strict=True):
            judged.submit(("retry", round_number), place, answer)
        for place, row, answer in zip(places, judged.rows(("retry", round_number)), answers, strict=True):
            if answer.problem:
                done.add(place)
            else:
                earlier[place].append(rows[place])
                rows[place] = replace(row, prompt_sha256=sha256(prompts[place]))
    return Retried(rows, earlier, asked, tokens)


def scores(retried: Retried, first: Sequence[Row]) -> dict[str, Any]:
    """`models.tuned.retry` of eval.json, without cost."""
    return {
        "rounds": len(retried.asked),
        "asked": retried.asked,
        "score": score(retried.rows) | {"new_tokens": retried.new_tokens + sum(row.new_tokens for row in first)},
        "gain": compared(first, retried.rows),
    }
