"""A model's answers in a file that grows as they come, so that an evaluation that was killed goes on where it was.

    {"format": 2, "settings": {...}, "prompts_sha256": ..., "questions": 493, "dtype": "bfloat16"}
    {"question": 17, "prompt_sha256": ..., "seconds": 0.031, "text": "SELECT ...", "new_tokens": 12, ...}
    ...

The file is named after a hash of everything that the answers depend on (model, adapter, prompts, generator, decoding), so that
those of another adapter or config are never taken. Answers are written a second after they came at the latest; the file is
opened for each write and closed after it, because a mounted bucket stores a file when it is closed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.data.records import read_lines
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer, LoadedModel, Sampling
from finetune.evaluation.score import sha256
from finetune.runtime.files import atomic_file, disk_error

FORMAT = 2
NOT_KEPT = ("out_of_memory", "failed")
"""Problems that another machine, or the same one without other programs, may not have: such questions are asked again."""
WRITE_SECONDS = 1.0
"""Between two writes, each of which a mounted bucket turns into an upload of the whole file."""


@dataclass
class AnswerFile:
    """The answers of one model to the prompts, in `path`.

    settings: everything else that the answers depend on. answers: by the number of the prompt. seconds: that generation took,
    over all attempts. loading_within: seconds of loading between the answers, not counted in `seconds`. sampling: None for greedy
    answers.
    """

    path: Path
    model_name: str
    settings: dict[str, Any]
    prompts: Sequence[str]
    batch_size: int
    sampling: Sampling | None = None
    dtype: str = ""
    seconds: float = 0.0
    loading_within: float = 0.0
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.prompts)

    def in_order(self) -> list[Answer]:
        return [self.answers[number] for number in range(len(self.prompts))]

    def kept(self) -> str:
        return f"{len(self.answers)} of {len(self.prompts)} answers of the {self.model_name} in {self.path}"

    def read(self) -> None:
        """Take over the answers of an earlier attempt. A file of other prompts, or one that cannot be read, counts as empty."""
        try:
            header, *lines = [line.value for line in read_lines(self.path) if not line.problem]
            kept = _kept(lines, self.prompts)
            if any(header[key] != value for key, value in self._header().items() if key != "dtype"):
                return
            dtype = str(header["dtype"])
        except (UserError, OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of another version
            return
        self.answers = {number: line.answer for number, line in kept.items()}
        self.seconds, self.dtype = sum(line.seconds for line in kept.values()), dtype
        self.loading_within = sum(line.loading for line in kept.values())

    def generate(
        self,
        load: Callable[[], LoadedModel],
        *,
        tuned: bool,
        max_new_tokens: int,
        progress: bool,
        told: Callable[[int, Answer], None] | None = None,
    ) -> None:
        """Ask for the missing answers. load: gives the model, which is loaded only if an answer is missing. told: called with
        each new answer and its number. Raises UserError if memory is too small or the disk is full; the answers so far are
        kept, also after Ctrl-C."""
        if self.complete:
            return
        model = load()
        self.dtype = model.dtype_name
        loaded = partial(getattr, model, "load_seconds", 0.0)
        self._write_kept()
        missing = [number for number in range(len(self.prompts)) if number not in self.answers]
        with tqdm(
            total=len(self.prompts), initial=len(self.answers), desc=f"{self.model_name} answers", unit="question",
            disable=not progress,
        ) as bar, self._writer(loaded) as keep:  # fmt: skip

            def done(place: int, answer: Answer) -> None:
                number = missing[place]
                if number in self.answers:
                    return
                keep(number, answer)
                bar.update()
                if told:
                    told(number, answer)

            given = model.answers(
                [self.prompts[number] for number in missing],
                tuned=tuned,
                batch_size=self.batch_size,
                max_new_tokens=max_new_tokens,
                sampling=self.sampling and replace(self.sampling, seeds=[self.sampling.seeds[n] for n in missing]),
                done=done,
                description=f"{self.model_name} answers",
                progress=False,
            )
            for place, answer in enumerate(given):
                done(place, answer)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": json.loads(json.dumps(self.settings)),
            "prompts_sha256": prompts_hash(self.prompts),
            "questions": len(self.prompts),
            "dtype": self.dtype,
        }

    def _write_kept(self) -> None:
        """The file without what is torn or answers another prompt. An unbroken file stays as it is."""
        lines = [line.value for line in read_lines(self.path)] if self.path.is_file() else []
        if self.answers and len(lines) == 1 + len(self.answers) and self.path.read_bytes().endswith(b"\n"):
            return
        with atomic_file(self.path) as file:
            file.write(json.dumps(self._header()) + "\n")
            for number, kept in sorted(_kept(lines[1:], self.prompts).items() if self.answers else []):
                file.write(self._line(number, *kept))

    @contextmanager
    def _writer(self, loaded: Callable[[], float]) -> Iterator[Callable[[int, Answer], None]]:
        """Gives a function that keeps one answer. At the end of the block, however it ends, every answer is written. loaded: the
        seconds that the model has spent on loading so far, which are no part of an answer's."""
        waiting: list[str] = []
        last = [time.monotonic()] * 2  # of the last answer, of the last write
        before = loaded()

        def keep(number: int, answer: Answer) -> None:
            nonlocal before
            now, loading = time.monotonic(), loaded() - before
            seconds, last[0] = round(max(0.0, now - last[0] - loading), 3), now
            before += loading
            self.answers[number] = answer
            self.seconds += seconds
            self.loading_within += loading
            waiting.append(self._line(number, answer, seconds, loading))
            if now - last[1] >= WRITE_SECONDS:
                self._append(waiting)
                last[1] = time.monotonic()

        try:
            yield keep
        finally:
            self._append(waiting)

    def _line(self, number: int, answer: Answer, seconds: float, loading: float) -> str:
        line = {"question": number, "prompt_sha256": sha256(self.prompts[number]), "seconds": seconds}
        if loading:
            line["loading_seconds"] = round(loading, 3)
        return json.dumps(line | answer._asdict(), ensure_ascii=False) + "\n"

    def _append(self, lines: list[str]) -> None:
        """Write the lines and empty the list. Raises UserError if the disk is full."""
        if not lines:
            return
        text = "".join(lines).encode("utf-8", "backslashreplace")
        lines.clear()
        try:
            with self.path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error


def prompts_hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


class _Line(NamedTuple):
    answer: Answer
    seconds: float
    loading: float


def _kept(lines: Sequence[Any], prompts: Sequence[str]) -> dict[int, _Line]:
    """The answers in the lines of a file with their seconds, by the number of the prompt. Lines that are damaged or answer
    another prompt are left out. Raises TypeError if they were written by another version."""
    found: dict[int, _Line] = {}
    for line in lines:
        if not isinstance(line, dict) or not all(isinstance(line.get(key), int) for key in ("question", "new_tokens")):
            continue
        number = line["question"]
        if not 0 <= number < len(prompts) or line["prompt_sha256"] != sha256(prompts[number]):
            continue
        answer = Answer(**{key: line[key] for key in Answer._fields})
        if answer.problem not in NOT_KEPT:
            found.setdefault(number, _Line(answer, float(line["seconds"]), float(line.get("loading_seconds", 0.0))))
    return found
