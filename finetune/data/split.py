"""Assigns records to train, val and test, and makes sure that no two splits share anything.

Test takes precedence over val, and val over train: a record that would be shared is removed from the split of lower precedence.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import sqlglot
from sqlglot import TokenType
from sqlglot.errors import TokenError
from tqdm import tqdm

from finetune.data.records import Record, Split
from finetune.data.validate import DUPLICATE_ID, DUPLICATE_QUESTION, LEAK, Accepted, Rejection
from finetune.sql.lexer import pieces

SplitBy = Literal["question", "database"]

_PRECEDENCE: dict[Split | None, int] = {"test": 0, "val": 1, None: 2, "train": 3}


_IN_QUOTES = re.compile(r"""(?<!\w)(?:'\S(?:.*?\S)??'|"[^"]+"|“[^”]+”|‘[^’]+’|«[^»]+»|`[^`]+`)(?!\w)""")
"""A quoted value in a question; an apostrophe inside or at the end of a word opens none."""


def question_key(record: Record) -> str:
    """The question in lower case except for values in quotes, with runs of whitespace collapsed."""
    text = " ".join(record.question.split())
    parts, end = [], 0
    for match in _IN_QUOTES.finditer(text):
        parts += [text[end : match.start()].casefold(), match[0]]
        end = match.end()
    return "".join([*parts, text[end:].casefold()])


def _question_as_written(record: Record) -> str:
    return " ".join(record.question.split())


def sql_key(record: Record) -> str:
    """The gold SQL normalised: lower case outside text literals, single spaces, no comments, no semicolon."""
    return _folded(record.sql, record.dialect, masked=False)


def sql_skeleton(record: Record) -> str:
    """The shape of the gold SQL: `sql_key` with numbers, text and double-quoted words masked."""
    return _folded(record.sql, record.dialect, masked=True)


@functools.lru_cache(maxsize=1 << 17)
def _folded(sql: str, dialect: str, masked: bool) -> str:
    parts = []
    try:
        tokens = sqlglot.tokenize(sql, read=dialect)
    except TokenError:  # a gold query that SQLite runs all the same
        return " ".join(piece.text.casefold() for piece in pieces(sql, dialect=dialect) if piece.is_code)
    for token in tokens:
        is_text = token.token_type == TokenType.STRING
        if masked and (is_text or token.token_type == TokenType.NUMBER or sql[token.start] == '"'):
            parts.append("?")
        elif token.token_type != TokenType.SEMICOLON:
            parts.append(f"'{token.text}'" if is_text else token.text.casefold())
    return " ".join(parts)


def drop_duplicates(accepted: Sequence[Accepted]) -> tuple[list[Accepted], list[Rejection]]:
    """Keep one record per id, and one per question about a database, in the original order.

    Two questions that differ in case alone are one, unless quoted values of their gold SQL differ in case as well: "grade a"
    and "grade A" may be two questions. The first one is kept, except that a record assigned to test or val by its source takes
    precedence.
    """
    ids: dict[str, Accepted] = {}
    questions: dict[tuple[str, str], list[Accepted]] = {}
    rejections: dict[int, Rejection] = {}
    for index in sorted(range(len(accepted)), key=lambda i: _PRECEDENCE[accepted[i].record.split]):
        item = accepted[index]
        same_id = ids.get(item.record.id)
        alike = questions.setdefault((item.record.db_id, question_key(item.record)), [])
        same_question = next((other for other in alike if _asks_the_same(item.record, other.record)), None)
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
            alike.append(item)
    kept = [item for index, item in enumerate(accepted) if index not in rejections]
    return kept, [rejections[index] for index in sorted(rejections)]


def _asks_the_same(one: Record, other: Record) -> bool:
    """Of two records with one `question_key`: whether also the values that they ask for are the same."""
    if _question_as_written(one) == _question_as_written(other):
        return True
    values, others = _quoted_values(one.sql, one.dialect), _quoted_values(other.sql, other.dialect)
    differ_in_case = values != others and {v.casefold() for v in values} == {v.casefold() for v in others}
    return not differ_in_case


def _quoted_values(sql: str, dialect: str) -> frozenset[str]:
    """What stands in quotes, double ones included: SQLite reads "A" as a value if there is no such column."""
    return frozenset(piece.text[1:-1] for piece in pieces(sql, dialect=dialect) if piece.kind in ("text", "name"))


def assign_splits(
    records: Sequence[Record],
    *,
    val_fraction: float,
    test_fraction: float,
    split_by: SplitBy,
    seed: int,
    progress: bool = False,
) -> list[Split]:
    """The split of each record: its own if it has one, else chosen by a seeded hash.

    Records without a split that share a question or gold SQL (with split_by="database": a database) form a group, which
    is never divided: the hash of its first member decides, or it goes to train if it shares with a record that is already
    assigned to train. So records added later do not move others, unless they connect two groups. Records already assigned
    to val or test are in no group and connect none; `find_leaks` handles what they share with others. The fractions refer
    to the records without a split, and are met approximately; a split that chance leaves empty gets one group, where there
    are enough.
    """
    keys_of = _keys_by(split_by)
    bar = tqdm(records, desc="Comparing records", unit="record", delay=1, disable=not progress)
    groups = _groups([[] if record.split in ("val", "test") else keys_of(record) for record in bar])
    in_train = {group for record, group in zip(records, groups, strict=True) if record.split == "train"}

    def hashed(first: Record) -> Split:
        draw = unit_hash(seed, first.db_id if split_by == "database" else sql_key(first))
        return "test" if draw < test_fraction else "val" if draw < test_fraction + val_fraction else "train"

    splits: list[Split] = [
        record.split or ("train" if group in in_train else hashed(records[group]))
        for record, group in zip(records, groups, strict=True)
    ]
    wanted: tuple[tuple[Split, float], ...] = (("val", val_fraction), ("test", test_fraction))
    for split, fraction in wanted:
        if fraction and split not in splits:
            _give_one_group(split, splits, records, groups, seed)
    return splits


def _give_one_group(
    split: Split, splits: list[Split], records: Sequence[Record], groups: Sequence[int], seed: int
) -> None:
    """Of few records, chance may leave a split empty: it gets the smallest group of train that nobody assigned, the same one each
    time, unless that would leave train with less than half."""
    given = {group for record, group in zip(records, groups, strict=True) if record.split}
    sizes = Counter(group for group, now in zip(groups, splits, strict=True) if now == "train" and group not in given)
    for group in sorted(sizes, key=lambda one: (sizes[one], unit_hash(seed, sql_key(records[one])))):
        if 2 * (splits.count("train") - sizes[group]) >= splits.count("train") and len(sizes) > 1:
            splits[:] = [split if mine == group else now for mine, now in zip(groups, splits, strict=True)]
            return


def unit_hash(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6]) / 2**48


def _keys_by(split_by: SplitBy) -> Callable[[Record], list[str]]:
    """The keys that no two splits may share; questions and gold SQL are compared across databases too."""
    if split_by == "database":
        return lambda record: [f"database {record.db_id}"]
    return lambda record: [f"question {question_key(record)}", f"gold SQL {sql_key(record)}"]


def _groups(keys: Sequence[list[str]]) -> list[int]:
    """For each item, the index of the first item that it is connected to through shared keys (union-find)."""
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
    """Rejections by index: records that share a question, gold SQL or (if split by it) a database with a higher-precedence split.

    Needed where sources assign splits, and with split_by="database" for questions shared across databases.
    """
    kinds: list[SplitBy] = ["question", "database"] if split_by == "database" else ["question"]
    leaks: dict[int, Rejection] = {}
    taken: dict[str, int] = {}
    for index in sorted(range(len(accepted)), key=lambda i: _PRECEDENCE[splits[i]]):
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


def subsample(records: Sequence[Record], limit: int, seed: int) -> set[int]:
    """Indices of the `limit` records to keep: a seeded sample. A larger limit only adds records; new records hardly change it."""
    order = sorted(range(len(records)), key=lambda i: (unit_hash(seed, f"keep {records[i].id}"), i))
    return set(order[:limit])
