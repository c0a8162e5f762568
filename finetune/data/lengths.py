"""Prompts and examples that are too long for the model: how many, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate
from finetune.data.records import SPLITS, Record, Split
from finetune.data.stats import token_counts


def too_long(
    config: RunConfig, records: Callable[[Split], Sequence[Record]], tokenizer: Any, positions: int | None
) -> list[str]:
    """One line for each kind of excess in each split. positions: of the model, None without a limit."""
    template = PromptTemplate(config.data.schema_format)
    limit, new_tokens = config.model.max_seq_length, config.evaluation.max_new_tokens
    lines = []
    for split in SPLITS:
        counts = token_counts(records(split), template, tokenizer, desc=f"Counting tokens of {split}")
        if split in ("train", "val"):
            what = f"examples are longer than model.max_seq_length={limit} tokens and are left out of training"
            lines.append(_line(split, [count.total for count in counts], limit, what))
        if split == config.evaluation.split:
            prompts = [count.total - count.completion for count in counts]
            lines += _of_evaluation(split, prompts, limit, new_tokens, positions)
    return [line for line in lines if line]


def _of_evaluation(
    split: Split, prompts: Sequence[int], limit: int, new_tokens: int, positions: int | None
) -> list[str]:
    what = f"prompts are longer than model.max_seq_length={limit} tokens: they are asked, but nothing so long was trained on"
    lines = [_line(split, prompts, limit, what)]
    if positions is None:
        return lines
    what = f"prompts leave no room in the model's {positions} positions and are scored as too_long"
    lines.append(_line(split, prompts, positions - 1, what))
    what = f"prompts leave less than evaluation.max_new_tokens={new_tokens} of the model's {positions} positions for the answer"
    near = [length if length < positions else 0 for length in prompts]
    return [*lines, _line(split, near, positions - new_tokens, what)]


def _line(split: Split, lengths: Sequence[int], limit: int, what: str) -> str:
    over = [length for length in lengths if length > max(limit, 0)]
    return f"{split}: {len(over)} of {len(lengths)} {what} (the longest has {max(over)})" if over else ""
