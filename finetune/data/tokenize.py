"""Tokenises records into training examples. Needs the extra `train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from finetune.data.prompts import PromptTemplate, completion
from finetune.data.records import Record
from finetune.example import Example
from finetune.tokens import encode_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Training examples, and the number of records left out as too long.

    Stored in an Arrow table, where a token takes 8 bytes; in Python lists it would take 36. Columns: input_ids, answer_start,
    length.
    """

    dataset: Dataset
    too_long: int = 0

    @classmethod
    def of(cls, examples: Iterable[Example], too_long: int = 0) -> Examples:
        kept = list(examples)
        columns = {
            "input_ids": [example.ids for example in kept],
            "answer_start": [example.answer_start for example in kept],
            "length": [len(example) for example in kept],
        }
        return cls(Dataset.from_dict(columns), too_long)

    @property
    def lengths(self) -> list[int]:
        """The length of each example in tokens."""
        return list(self.dataset["length"])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        row = self.dataset[index]
        return Example(row["input_ids"], row["answer_start"])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def tokenise(
    records: Sequence[Record],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    encode: Callable[[Any, Sequence[str], Sequence[str]], list[Example]] = encode_examples,
) -> Examples:
    """Examples of all records that fit into max_tokens; nothing is truncated. encode: called with tokenizer, prompts, answers."""
    prompts = [template.render_record(record) for record in records]
    encoded = encode(tokenizer, prompts, [completion(record.sql, dialect=record.dialect) for record in records])
    kept = [example for example in encoded if len(example) <= max_tokens]
    return Examples.of(kept, len(encoded) - len(kept))
