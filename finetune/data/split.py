"""Who goes into train, val and test, and that nothing is in two of them.

Test wins over val, and val over train: where two splits would share something, the weaker one gives its record up.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import sqlglot
from sqlglot import TokenType
from tqdm import tqdm

from finetune.data.records import Record, Split
from finetune.data.validate import DUPLICATE_ID, DUPLICATE_QUESTION, LEAK, Accepted, Rejection

SplitBy = Literal["question", "database"]

_STRENGTH: dict[Split | None, int] = {"test": 0, "val": 1, None: 2, "train": 3}


def question_key(record: Record) -> str:
    """The question with case and spaces folded."""
    return " ".join(record.question.casefold().split())


def sql_key(record: Record) -> str:
    """The gold SQL with case (outside text literals), spaces, comments and the closing semicolon folded."""
    return _folded(record.sql, record.dialect, masked=False)


def sql_skeleton(record: Record) -> str:
    """The gold SQL as `sql_key`, with numbers, text and double-quoted words masked: what is left is its shape."""
    return _folded(record.sql, record.dialect, masked=True)


@functools.lru_cache(maxsize=1 << 17)
def _folded(sql: str, dialect: str, masked: bool) -> str:
    parts = []
    for token in sqlglot.tokenize(sql, read=dialect):
        is_text = token.token_type == TokenType.STRING
        if masked and (is_text or token.token_type == TokenType.NUMBER or sql[token.start] == '"'):
            parts.append("?")
        elif token.token_type != TokenType.SEMICOLON:
            parts.append(f"'{token.text}'" if is_text else token.text.casefold())
    return " ".join(parts)


def drop_duplicates(accepted: Sequence[Accepted]) -> tuple[list[Accepted], list[Rejection]]:
    """Keep one record of each id, and one of each question about a database; the order stays.

    The first one is kept, but one whose split is given as test or val goes before all others.
    """
    ids: dict[str, Accepted] = {}
    questions: dict[tuple[str, str], Accepted] = {}
    rejections: dict[int, Rejection] = {}
    for index in sorted(range(len(accepted)), key=lambda i: _STRENGTH[accepted[i].record.split]):
        item = accepted[index]
        same_id = ids.get(item.record.id)
        same_question = questions.get((item.record.db_id, question_key(item.record)))
        if same_id:
            detail = f"id {item.record.id!r} is also that of {same_id.candidate.where}"
            rejections[index] = Rejection(item.candidate, DUPLICATE_ID, detail)
        elif same_question:
            split = same_question.record.split
            leak = split in ("test", "val") and split != item.record.split
            detail = f"asks the same as {same_question.candidate.where}" + (f", which is in {split}" if leak else "")
            rejections[index] = Rejection(item.candidate, LEAK if leak else DUPLICATE_QUESTION, detail)
        else:
            ids[item.record.id] = item
            questions[item.record.db_id, question_key(item.record)] = item
    kept = [item for index, item in enumerate(accepted) if index not in rejections]
    return kept, [rejections[index] for index in sorted(rejections)]


def assign_splits(
    records: Sequence[Record],
    *,
    val_fraction: float,
    test_fraction: float,
    split_by: SplitBy,
    seed: int,
    progress: bool = False,
) -> list[Split]:
    """The split of each record: its own where it has one, else by a seeded hash.

    Records without a split that share a question or gold SQL (with split_by="database": a database) form a group, which
    is never torn apart: it follows the hash of its first member, or goes to train if it shares with a record given
    there. So records that are added later move no others, unless they join two groups. Given val and test sets stay as
    they are: nothing joins a group through them, and `find_leaks` settles what they share with others. Fractions are
    those of the records without a split, and met approximately.
    """
    keys_of = _keys_by(split_by)
    bar = tqdm(records, desc="Comparing records", unit="record", delay=1, disable=not progress)
    groups = _groups([[] if record.split in ("val", "test") else keys_of(record) for record in bar])
    in_train = {group for record, group in zip(records, groups, strict=True) if record.split == "train"}

    def hashed(first: Record) -> Split:
        draw = unit_hash(seed, first.db_id if split_by == "database" else sql_key(first))
        return "test" if draw < test_fraction else "val" if draw < test_fraction + val_fraction else "train"

    return [
        record.split or ("train" if group in in_train else hashed(records[group]))
        for record, group in zip(records, groups, strict=True)
    ]


def unit_hash(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6]) / 2**48


def _keys_by(split_by: SplitBy) -> Callable[[Record], list[str]]:
    """What no two splits may share; questions and gold SQL also across databases."""
    if split_by == "database":
        return lambda record: [f"database {record.db_id}"]
    return lambda record: [f"question {question_key(record)}", f"gold SQL {sql_key(record)}"]


def _groups(keys: Sequence[list[str]]) -> list[int]:
    """For each item the index of the first one that it is connected to through shared keys (union-find)."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[str, int] = {}
    for index, mine in enumerate(keys):
        for key in mine:
            first, second = sorted((root(owner.setdefault(key, index)), root(index)))
            parent[second] = first
    return [root(index) for index in range(len(keys))]


def find_leaks(accepted: Sequence[Accepted], splits: Sequence[Split], split_by: SplitBy) -> dict[int, Rejection]:
    """Rejections, by index, of what shares a question, gold SQL or (if split by it) a database with a stronger split.

    Needed where splits are given, and between databases when they are what was split.
    """
    kinds: list[SplitBy] = ["question", "database"] if split_by == "database" else ["question"]
    leaks: dict[int, Rejection] = {}
    taken: dict[str, int] = {}
    for index in sorted(range(len(accepted)), key=lambda i: _STRENGTH[splits[i]]):
        keys = [key for kind in kinds for key in _keys_by(kind)(accepted[index].record)]
        clash = next((key for key in keys if key in taken and splits[taken[key]] != splits[index]), None)
        if clash:
            other = taken[clash]
            what = clash.split(" ")[0].replace("gold", "gold SQL")
            detail = f"the same {what} is in {splits[other]}: {accepted[other].candidate.where}"
            leaks[index] = Rejection(accepted[index].candidate, LEAK, detail)
        else:
            for key in keys:
                taken.setdefault(key, index)
    return leaks


def thin_out(records: Sequence[Record], limit: int, seed: int) -> set[int]:
    """Indices of the `limit` records to keep: a seeded sample that grows with the limit and hardly moves otherwise."""
    order = sorted(range(len(records)), key=lambda i: (unit_hash(seed, f"keep {records[i].id}"), i))
    return set(order[:limit])
