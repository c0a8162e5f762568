"""Records become tokens, with labels on the answer alone. Needs the extra `train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from finetune.data.prompts import Encoded, PromptTemplate, completion, encode_examples
from finetune.data.records import Record
from finetune.models.fused.model import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Tokenised examples that fit, and how many were too long. Columns: input_ids, labels (IGNORED on the prompt), length."""

    dataset: Dataset
    too_long: int


def tokenise(
    records: Sequence[Record], template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Examples:
    """Every record whose prompt, answer and end-of-text token fit into max_tokens; nothing is ever cut."""
    prompts = [template.render_record(record) for record in records]
    encoded = encode_examples(tokenizer, prompts, [completion(record.sql) for record in records])
    kept = [example for example in encoded if len(example.input_ids) <= max_tokens]
    columns = {
        "input_ids": [example.input_ids for example in kept],
        "labels": [_labels(example) for example in kept],
        "length": [len(example.input_ids) for example in kept],
    }
    return Examples(Dataset.from_dict(columns), len(encoded) - len(kept))


def _labels(example: Encoded) -> list[int]:
    return [IGNORED] * example.prompt_tokens + example.input_ids[example.prompt_tokens :]
