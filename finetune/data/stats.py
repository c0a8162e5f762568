"""Statistics for the manifest: token lengths, records per database, and how much of test has the shape of train."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from finetune.data.prompts import PromptTemplate, completion
from finetune.data.records import Record
from finetune.data.split import sql_skeleton
from finetune.tokens import encode_examples

_BATCH = 256
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class TokenCount:
    """total: tokens of prompt, answer and end of text, as in training. completion: the tokens that contribute to the loss."""

    total: int
    completion: int


def token_counts(
    records: Sequence[Record],
    template: PromptTemplate,
    tokenizer: Any,
    *,
    desc: str = "Counting tokens",
    progress: bool = True,
) -> list[TokenCount]:
    """Token counts of each record. tokenizer: as for `tokens.encode_examples`."""
    counts: list[TokenCount] = []
    with tqdm(total=len(records), desc=desc, unit="record", delay=1, disable=not progress) as bar:
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            prompts = [template.render_record(record) for record in batch]
            examples = encode_examples(tokenizer, prompts, [completion(r.sql, dialect=r.dialect) for r in batch])
            counts += [TokenCount(len(example), example.answer_tokens) for example in examples]
            bar.update(len(batch))
    return counts


def token_summary(counts: Sequence[TokenCount], max_seq_length: int) -> dict[str, int | None]:
    """Sums, percentiles (nearest rank) and the number of records longer than `max_seq_length` tokens."""
    totals = sorted(count.total for count in counts)
    summary: dict[str, int | None] = {
        f"p{p}": totals[math.ceil(p / 100 * len(totals)) - 1] if totals else None for p in _PERCENTILES
    }
    return summary | {
        "max": totals[-1] if totals else None,
        "total": sum(totals),
        "completion": sum(count.completion for count in counts),
        "longer_than_max_seq_length": sum(total > max_seq_length for total in totals),
    }


def per_database(records: Sequence[Record]) -> dict[str, int]:
    return dict(sorted(Counter(record.db_id for record in records).items()))


def skeleton_overlap(train: Sequence[Record], held_out: Sequence[Record]) -> dict[str, int]:
    """How many held-out questions have gold SQL whose shape, literals masked, also occurs in train."""
    known = {sql_skeleton(record) for record in train}
    return {
        "questions": len(held_out),
        "skeleton_in_train": sum(sql_skeleton(record) in known for record in held_out),
    }
