"""Where an answer ends, for every generator: at an end-of-text token, or as soon as no further token could change the SQL in it
(the rules of data/answers.py)."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from finetune.data.answers import AnswerReader
from finetune.tokens import decode_answer

_MAY_END_AN_ANSWER = frozenset(";#`~>▷]:\n")
"""Only after these may an answer be complete. What training teaches hardly holds them, so that such answers cost nothing."""
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*\w{0,20}\Z")
"""An answer that ends so: the word after the blank line decides whether its query goes on."""


class EndOfAnswers:
    """What all answers of one model have in common. ends: the tokens that end an answer (tokens.stop_ids)."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self._may_end: dict[int, bool] = {}

    def answer(self, dialect: str) -> GrowingAnswer:
        return GrowingAnswer(self, dialect)

    def may_end(self, token: int) -> bool:
        """Whether an answer may be complete after this token."""
        known = self._may_end.get(token)
        if known is None:
            text: str = self.tokenizer.decode([token])
            known = self._may_end[token] = not _MAY_END_AN_ANSWER.isdisjoint(text)
        return known


class GrowingAnswer:
    """One answer while its tokens come. ids: they, without the one that ended it.

    Its tokens are decoded once each, together with those decoded before them, on which their spaces depend; the whole answer is
    decoded only to confirm that it is complete.
    """

    def __init__(self, common: EndOfAnswers, dialect: str) -> None:
        self.ids: list[int] = []
        self.complete = False
        self._common, self._dialect = common, dialect
        self._reader, self._text = AnswerReader(dialect), ""
        self._before, self._read = 0, 0  # tokens: where the context begins, and how many are in the text
        self._waits = False  # for the word after a blank line

    def add(self, token: int) -> bool:
        """Take one more token; returns whether the answer is complete, after which none must be added."""
        if token in self._common.ends:
            self.complete = True
            return True
        self.ids.append(token)
        if self._waits or self._common.may_end(token):
            self._read_on()
        return self.complete

    @property
    def text(self) -> str:
        return decode_answer(self._common.tokenizer, self.ids)

    def _read_on(self) -> None:
        decode, tokenizer = decode_answer, self._common.tokenizer
        ids = self.ids[self._before :]
        text = decode(tokenizer, ids)
        if text.endswith("\ufffd"):  # a character of which a token is missing
            return
        self._text += text[len(decode(tokenizer, ids[: self._read - self._before])) :]
        self._before, self._read = self._read, len(self.ids)
        self._waits = _BLANK_LINE.search(self._text, max(0, len(self._text) - 60)) is not None
        if self._reader.feed(self._text):
            self._confirm()

    def _confirm(self) -> None:
        self._text = self.text
        self._reader = AnswerReader(self._dialect)
        self.complete = self._reader.feed(self._text)
