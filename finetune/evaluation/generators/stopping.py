"""Ends each row of a batch as soon as no further token could change the SQL in it: the rules are those of data/answers.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from finetune.data.answers import AnswerReader
from finetune.tokens import decode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAY_END_AN_ANSWER = frozenset(";#`~>▷]:\n")
"""Only after these may an answer be complete. What training teaches hardly holds them, so that such answers cost nothing."""
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*\w{0,20}\Z")
"""An answer that ends so: the word after the blank line decides whether its query goes on."""


class AnswersComplete(StoppingCriteria):
    """A transformers stopping criterion for one batch. dialects: of each row; all SQLite's if there are none."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, dialects: Sequence[str] | None = None
    ) -> None:
        self._tokenizer, self._prompt_tokens, self._dialects = tokenizer, prompt_tokens, dialects
        self._rows: list[_Row] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        if not self._rows:
            dialects = self._dialects or ["sqlite"] * len(input_ids)
            self._rows = [_Row(self._tokenizer, dialect) for dialect in dialects]
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        for row, ids, token in zip(self._rows, input_ids, last, strict=True):
            if not row.complete and (row.waits or not _MAY_END_AN_ANSWER.isdisjoint(token)):
                row.read(ids[self._prompt_tokens :])
        complete = [row.complete for row in self._rows]
        return torch.tensor(complete, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


class _Row:
    """One answer so far. Its tokens are decoded once each, together with those decoded before them, on which their spaces
    depend; the whole answer is decoded only to confirm that it is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dialect: str) -> None:
        self._tokenizer, self._dialect = tokenizer, dialect
        self._reader, self._text = AnswerReader(dialect), ""
        self._before, self._read = 0, 0  # tokens: where the context begins, and how many are in the text
        self.complete = False
        self.waits = False  # for the word after a blank line

    def read(self, answer: torch.Tensor) -> None:
        ids = answer[self._before :].tolist()
        text = decode_answer(self._tokenizer, ids)
        if text.endswith("\ufffd"):  # a character of which a token is missing
            return
        self._text += text[len(decode_answer(self._tokenizer, ids[: self._read - self._before])) :]
        self._before, self._read = self._read, len(answer)
        self.waits = _BLANK_LINE.search(self._text, max(0, len(self._text) - 60)) is not None
        if self._reader.feed(self._text):
            self._confirm(answer)

    def _confirm(self, answer: torch.Tensor) -> None:
        self._text = decode_answer(self._tokenizer, answer.tolist())
        self._reader = AnswerReader(self._dialect)
        self.complete = self._reader.feed(self._text)
