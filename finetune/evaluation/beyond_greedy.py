"""What a run's model can do beyond its greedy answers, if the config asks for it: a vote over samples, and another try after an
error. Each is scored on the same questions as the greedy answers, beside them, with its gain and its cost apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.schema import EvaluationSection
from finetune.evaluation import retries, samples
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.asking import Price, answers_key, complete
from finetune.evaluation.cost import Load, cost_of
from finetune.evaluation.generators.base import Answer, Sampling
from finetune.evaluation.judging import Judging
from finetune.evaluation.questions import EvaluationSet
from finetune.evaluation.score import Row
from finetune.run_folder import RunFolder
from finetune.runtime.files import atomic_file


def wanted(evaluation: EvaluationSection) -> bool:
    """Whether the config asks for more than greedy answers."""
    return evaluation.samples > 1 or evaluation.retries > 0


@dataclass
class Beyond:
    """Asks a run's tuned model more than the greedy answers, and scores that.

    load: gives the model, loaded once for the whole evaluation. files: the files of answers so far, for what an interruption
    says.
    """

    questions: EvaluationSet
    run: RunFolder
    load: Load
    price: Price
    judged: Judging
    progress: bool = True
    files: list[AnswerFile] = field(default_factory=list)

    def scores(self, greedy: Sequence[Row]) -> dict[str, Any]:
        """The keys `samples` and `retry` of models.tuned in eval.json, as far as the config asks for them; also writes
        eval/tuned-vote.jsonl and eval/tuned-retry.jsonl. greedy: the rows of the greedy answers."""
        evaluation = self.questions.config.evaluation
        found: dict[str, Any] = {}
        if evaluation.samples > 1:
            found["samples"] = self._samples(greedy)
        if evaluation.retries:
            found["retry"] = self._retry(greedy)
        return found

    def _samples(self, greedy: Sequence[Row]) -> dict[str, Any]:
        evaluation, number = self.questions.config.evaluation, len(self.questions.records)

        def told(place: int, answer: Answer) -> None:
            question, sample = divmod(place, evaluation.samples)
            self.judged.submit(samples.key_of(sample), question, answer)

        prompts = samples.repeated(self.questions, evaluation.samples)
        sampling = samples.sampling(self.questions)
        settings = {"sampling": samples.sampled_with(evaluation)}
        answers = self._answered("samples", prompts, settings, told, sampling)
        if not evaluation.retries:
            self.judged.nothing_else_runs()
        found = samples.judged_samples(self.judged, evaluation.samples, number)
        rows = self._write("vote", found.lines())
        result = samples.scores(found, greedy, evaluation) | {"cost": cost_of([answers]).as_dict()}
        return result | {"vote": result["vote"] | {"rows": rows}}

    def _retry(self, greedy: Sequence[Row]) -> dict[str, Any]:
        files: list[AnswerFile] = []

        def ask(round_number: int, prompts: Sequence[str]) -> list[Answer]:
            settings = {"retry": retries.retried_with(round_number)}
            files.append(self._answered("retry", prompts, settings, lambda *_: None))
            return files[-1].in_order()

        found = retries.retry(self.questions, greedy, ask, self.judged)
        rows = self._write("retry", found.lines())
        return retries.scores(found, greedy) | {"cost": cost_of(files).as_dict(), "rows": rows}

    def _answered(
        self,
        name: str,
        prompts: Sequence[str],
        settings: dict[str, Any],
        told: Callable[[int, Answer], None],
        sampling: Sampling | None = None,
    ) -> AnswerFile:
        """The complete file of the answers to these prompts. told: called with each one, kept or new."""
        settings = self.questions.generation(self.run.adapter) | settings
        path = self.run.path / "eval" / "answers" / f"tuned-{name}-{answers_key(settings, prompts)}.jsonl"
        evaluation = self.questions.config.evaluation
        answers = AnswerFile(path, f"tuned model ({name})", settings, prompts, evaluation.batch_size, sampling)
        answers.read()
        self.files.append(answers)
        complete(
            answers,
            self.load,
            self.price,
            tuned=True,
            max_new_tokens=evaluation.max_new_tokens,
            progress=self.progress,
            told=told,
        )
        return answers

    def _write(self, name: str, lines: Iterable[dict[str, Any]]) -> str:
        """Write eval/tuned-NAME.jsonl. Returns its path in the run's folder."""
        path: Path = self.run.eval_rows(f"tuned-{name}")
        with atomic_file(path) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return str(path.relative_to(self.run.path))
