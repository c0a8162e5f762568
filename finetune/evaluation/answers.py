"""A model's answers in a file that grows with every batch, so that an evaluation that was killed goes on where it was.

    {"format": 1, "settings": {...}, "prompts_sha256": ..., "questions": 493, "batch_size": 16, "dtype": "bfloat16"}
    {"batch": 0, "of": 16, "question": 17, "prompt_sha256": ..., "seconds": 2.1, "text": "SELECT ...", "new_tokens": 12}
    ...

The file is named after a hash of everything that the answers depend on (model, adapter, prompts, decoding), so that those of
another adapter or config are never taken. Batches are formed here, the longest prompts first, and only whole batches are kept: a
batch is computed with the same neighbours whether or not the evaluation was interrupted, because padding changes the rounding.
The file is opened for each batch and closed after it, because a mounted bucket stores a file when it is closed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.data.records import read_lines
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer, LoadedModel
from finetune.evaluation.score import sha256
from finetune.runtime.console import say
from finetune.runtime.files import atomic_file, disk_error

FORMAT = 1


@dataclass
class AnswerFile:
    """The answers of one model to the prompts, in `path`.

    settings: everything else that the answers depend on. answers: by the number of the prompt. seconds: that generation took,
    over all attempts.
    """

    path: Path
    model_name: str
    settings: dict[str, Any]
    prompts: Sequence[str]
    batch_size: int
    dtype: str = ""
    seconds: float = 0.0
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.prompts)

    def in_order(self) -> list[Answer]:
        return [self.answers[number] for number in range(len(self.prompts))]

    def batches(self) -> list[list[int]]:
        """The numbers of the prompts of each batch; prompts of similar length share one, and if memory does not suffice, that
        shows at the first."""
        order = sorted(range(len(self.prompts)), key=lambda number: (-len(self.prompts[number].encode()), number))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def kept(self) -> str:
        return f"{len(self.answers)} of {len(self.prompts)} answers of the {self.model_name} in {self.path}"

    def read(self) -> None:
        """Take over the whole batches of an earlier attempt. A file of other prompts, or one that cannot be read, counts as
        empty; so does an incomplete one with another batch size, whose batches would be others."""
        try:
            header, *lines = [line.value for line in read_lines(self.path) if not line.problem]
            batches = _whole_batches(lines, self.prompts)
            seconds = sum(seconds for _, seconds in batches.values())
            answers = {number: answer for batch, _ in batches.values() for number, answer in batch.items()}
            if any(header[key] != value for key, value in self._header().items() if key not in ("batch_size", "dtype")):
                return
            dtype, batch_size = str(header["dtype"]), header["batch_size"]
        except (UserError, OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of another version
            return
        if len(answers) < len(self.prompts) and batch_size != self.batch_size:
            if answers:
                say(f"{self.path}: {len(answers)} answers with batches of {batch_size} are not used, since "
                    f"evaluation.batch_size is now {self.batch_size}")  # fmt: skip
            return
        self.answers, self.seconds, self.dtype = answers, seconds, dtype

    def generate(self, load: Callable[[], LoadedModel], *, tuned: bool, max_new_tokens: int, progress: bool) -> None:
        """Ask for the missing answers. load: gives the model, which is loaded only if an answer is missing. Raises UserError if
        memory is too small or the disk is full; the answers so far are kept."""
        if self.complete:
            return
        model = load()
        self.dtype = model.dtype_name
        self._write_kept()
        with tqdm(
            total=len(self.prompts), initial=len(self.answers), desc=f"{self.model_name} answers", unit="question",
            disable=not progress,
        ) as bar:  # fmt: skip
            for place, batch in enumerate(self.batches()):
                if all(number in self.answers for number in batch):
                    continue
                started = time.monotonic()
                new = model.answers(
                    [self.prompts[number] for number in batch],
                    tuned=tuned,
                    batch_size=self.batch_size,
                    max_new_tokens=max_new_tokens,
                    description=f"{self.model_name} answers",
                    progress=False,
                )
                self._append(place, dict(zip(batch, new, strict=True)), time.monotonic() - started)
                bar.update(len(batch))

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": json.loads(json.dumps(self.settings)),
            "prompts_sha256": prompts_hash(self.prompts),
            "questions": len(self.prompts),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }

    def _write_kept(self) -> None:
        """The file without what is torn or belongs to an incomplete batch. An unbroken file stays as it is."""
        kept = [line.value for line in read_lines(self.path)] if self.path.is_file() else []
        if self.answers and len(kept) == 1 + len(self.answers) and self.path.read_bytes().endswith(b"\n"):
            return
        numbers = {(line["batch"], line["question"]): line for line in kept[1:] if _is_line(line)}
        with atomic_file(self.path) as file:
            file.write(json.dumps(self._header()) + "\n")
            for place, batch in enumerate(self.batches()):
                if all(number in self.answers for number in batch):
                    file.writelines(_json_line(numbers[place, number]) for number in batch)

    def _append(self, place: int, answers: dict[int, Answer], seconds: float) -> None:
        lines = [
            {
                "batch": place,
                "of": len(answers),
                "question": number,
                "prompt_sha256": sha256(self.prompts[number]),
                "seconds": round(seconds, 3),
                **answer._asdict(),
            }
            for number, answer in answers.items()
        ]
        text = "".join(map(_json_line, lines)).encode("utf-8", "backslashreplace")
        try:
            with self.path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.answers |= answers
        self.seconds += round(seconds, 3)


def prompts_hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _is_line(line: Any) -> bool:
    numbers = ("batch", "of", "question", "new_tokens")
    return isinstance(line, dict) and all(isinstance(line.get(key), int) for key in numbers)


def _whole_batches(lines: Sequence[Any], prompts: Sequence[str]) -> dict[int, tuple[dict[int, Answer], float]]:
    """The batches of which every answer is there: by their number, the answers by the prompt's number, and the seconds. Lines
    that are damaged or answer another prompt are left out. Raises TypeError if they were written by another version."""
    found: dict[int, dict[int, Answer]] = {}
    size: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for line in filter(_is_line, lines):
        number, place = line["question"], line["batch"]
        if not 0 <= number < len(prompts) or line["prompt_sha256"] != sha256(prompts[number]):
            continue
        answer = Answer(**{key: line[key] for key in Answer._fields})
        if answer.problem == "out_of_memory":  # another machine, or the same one without other programs, may have room
            continue
        found.setdefault(place, {}).setdefault(number, answer)
        size[place], seconds[place] = line["of"], float(line["seconds"])
    return {place: (batch, seconds[place]) for place, batch in found.items() if len(batch) == size[place]}
