"""Several answers to each question, drawn at random, and what they are worth: a vote over their results, and pass@k.

Every sample's SQL is executed, and the SQL of the most frequent result wins: self-consistency (Wang et al. 2023) over results,
not texts. The vote sees what a user would see, never the gold query. pass@k, the share of questions of which at least one of k
samples is right, is what a perfect choice among them would reach. Only the tuned model is sampled: the base model would cost as
much again, and says nothing about how to use the tuned one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from statistics import mean
from typing import TYPE_CHECKING, Any

from finetune.config.schema import EvaluationSection
from finetune.evaluation.generators.base import Sampling
from finetune.evaluation.judging import Judging
from finetune.evaluation.paired import gains
from finetune.evaluation.score import CORRECT, Row, as_dict, score
from finetune.evaluation.statistics import mcnemar_exact

if TYPE_CHECKING:
    from finetune.evaluation.questions import EvaluationSet


@dataclass(frozen=True)
class Vote:
    """sample: the number of the chosen one, from 0. votes: samples with its result. counted: samples that gave a result.
    results: how many different ones they gave."""

    sample: int
    votes: int
    counted: int
    results: int


def vote(results: Sequence[str | None], queries: Sequence[str]) -> Vote:
    """The vote over the samples of one question. results: a key of each one's result, None where its SQL did not run; such do not
    vote. queries: the SQL of each.

    Among results that are as frequent the one that came first wins, and within the winning one the most frequent text of SQL,
    again the first. If no sample gave a result, the first one is chosen, with 0 votes.
    """
    counted = [result for result in results if result is not None]
    if not counted:
        return Vote(0, 0, 0, 0)
    winner = _most_frequent(counted)
    members = [number for number, result in enumerate(results) if result == winner]
    text = _most_frequent([queries[number] for number in members])
    chosen = next(number for number in members if queries[number] == text)
    return Vote(chosen, len(members), len(counted), len(set(counted)))


def _most_frequent(values: Sequence[str]) -> str:
    return max(dict.fromkeys(values), key=values.count)  # max takes the first of equals


def pass_at(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, of which `right` of `samples` were: the unbiased estimator of Chen et
    al. 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k), as a product that cannot overflow."""
    if samples - right < k:
        return 1.0
    return 1.0 - prod(1.0 - k / number for number in range(samples - right + 1, samples + 1))


def sizes(samples: int) -> list[int]:
    """The k of which pass@k is reported: 1, 2, 4 and the number of samples."""
    return sorted({k for k in (1, 2, 4, samples) if k <= samples})


def repeated(questions: EvaluationSet, samples: int) -> list[str]:
    """The prompts of all samples: those of one question are neighbours, so that a generator may keep what they share."""
    return [prompt for prompt in questions.prompts for _ in range(samples)]


def sampling(questions: EvaluationSet) -> Sampling:
    """The seed of a sample follows from evaluation.seed, the question's id and its number: not from the other questions, nor from
    how many samples there are."""
    evaluation = questions.config.evaluation
    seeds = [
        _seed(evaluation.seed, record.id, number)
        for record in questions.records
        for number in range(evaluation.samples)
    ]
    return Sampling(evaluation.temperature, seeds)


def _seed(seed: int, question: str, number: int) -> int:
    """At most 31 bits, which every generator takes."""
    text = f"{seed}:{number}:{question}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) >> 1


def sampled_with(evaluation: EvaluationSection) -> dict[str, Any]:
    """What samples depend on besides what greedy answers do: part of the key of kept ones."""
    return {"samples": evaluation.samples, "temperature": evaluation.temperature, "seed": evaluation.seed}


@dataclass(frozen=True)
class Samples:
    """The judged samples: for each question the rows of its samples in order, and the vote over them."""

    rows: list[list[Row]]
    votes: list[Vote]

    @property
    def chosen(self) -> list[Row]:
        return [rows[vote.sample] for rows, vote in zip(self.rows, self.votes, strict=True)]

    @property
    def best(self) -> list[Row]:
        """The first right sample of each question, else the one that the vote chose."""
        pairs = zip(self.rows, self.chosen, strict=True)
        return [next((row for row in rows if row.verdict == CORRECT), chosen) for rows, chosen in pairs]

    def lines(self) -> list[dict[str, Any]]:
        """The lines of eval/tuned-vote.jsonl: the chosen row of each question, its vote, and the verdicts of all samples."""
        return [
            as_dict(rows[vote.sample]) | asdict(vote) | {"samples": [row.verdict for row in rows]}
            for rows, vote in zip(self.rows, self.votes, strict=True)
        ]


def judged_samples(judged: Judging, samples: int, questions: int) -> Samples:
    """The rows of all samples, which were submitted under `key_of`."""
    by_number = [judged.rows(key_of(number)) for number in range(samples)]
    assert all(len(rows) == questions for rows in by_number)
    rows = [list(of_one) for of_one in zip(*by_number, strict=True)]
    return Samples(rows, [vote([r.result_sha256 for r in of_one], [r.prediction for r in of_one]) for of_one in rows])


def key_of(number: int) -> tuple[str, int]:
    """Under which the samples of this number are judged."""
    return "sample", number


def scores(samples: Samples, greedy: Sequence[Row], evaluation: EvaluationSection) -> dict[str, Any]:
    """`models.tuned.samples` of eval.json, without cost. greedy: the rows of the greedy answers to the same questions."""
    tokens = sum(row.new_tokens for rows in samples.rows for row in rows)
    right = [sum(row.verdict == CORRECT for row in rows) for rows in samples.rows]
    size = evaluation.samples
    return {
        "n": size,
        "temperature": evaluation.temperature,
        "seed": evaluation.seed,
        "vote": score(samples.chosen) | {"new_tokens": tokens},
        "pass_at": score(samples.best) | {"new_tokens": tokens},
        "pass_at_k": {str(k): mean(pass_at(size, count, k) for count in right) for k in sizes(size)},
        "no_result": sum(not vote.counted for vote in samples.votes),
        "unanimous": sum(vote.results == 1 and vote.counted == size for vote in samples.votes),
        "gain": {"vote": compared(greedy, samples.chosen), "pass_at": compared(greedy, samples.best)},
    }


def compared(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """Questions won and lost (`score.gains`), with McNemar's exact test."""
    found = gains(before, after)
    return found | {"exact_p": mcnemar_exact(found["gain"]["won"], found["gain"]["lost"])}
