"""Compares two results under the rules by which text-to-SQL models are scored.

- ``test_suite``: the rule of the test-suite evaluator (Zhong, Yu and Klein, EMNLP 2020;
  taoyds/test-suite-sql-eval) with its option --keep_distinct: the same rows, each the same number of times,
  in any order of columns; the order of rows matters only if the gold query orders them. This is our default.
- ``test_suite_no_distinct``: the same without that option, as published Spider scores are computed: DISTINCT is
  deleted from both queries before they run.
- ``bird_set``: the rule of BIRD (Li et al., NeurIPS 2023): the same set of rows, regardless of duplicates and
  order, with the columns in the same order.
- ``strict``: as ``test_suite``, but with the columns in the same order, and both queries run as they are written.

Values are compared as Python compares them, as in both evaluators: 1 equals 1.0, '1' does not; NULL equals
NULL; no rounding. Two empty results are equal whatever their columns.

Left out: the evaluator's option --plug_value, which puts gold's constants into the prediction, for models that predict none;
and Spider's exact match, which compares the text of queries, not their results.

Two queries with equal results on one database may still differ in meaning: a count that is right by chance is scored as right.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Literal, get_args

from finetune.sql.columns import equal_in_some_column_order
from finetune.sql.text import has_order_by, without_distinct

Row = tuple[Hashable, ...]
Rows = Sequence[Row]
Rule = Literal["test_suite", "test_suite_no_distinct", "bird_set", "strict"]
RULES: tuple[Rule, ...] = get_args(Rule)


def results_equal(gold: Rows, predicted: Rows, *, ordered: bool, rule: Rule) -> bool:
    """Whether the predicted rows equal the gold rows under `rule`.

    ordered: whether the gold query orders its rows (see `gold_is_ordered`); the rule ``bird_set`` ignores it.
    """
    if gold == predicted:  # also both empty; the most frequent case by far
        return True
    if not gold or not predicted:
        return False
    if len(gold[0]) != len(predicted[0]):
        return False
    if rule == "bird_set":
        return set(gold) == set(predicted)
    if len(gold) != len(predicted):
        return False
    if ordered:
        if rule == "strict":
            return list(gold) == list(predicted)
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    if Counter(gold) == Counter(predicted):
        return True
    return rule != "strict" and equal_in_some_column_order(gold, predicted)


def result_hash(rows: Rows, *, rule: Rule) -> str:
    """The SHA-256 of a result, whatever the order of its rows, to find equal results of several queries without a gold query.

    Equal hashes mean equal rows under every rule but for their order; the order of the columns counts, though the test-suite
    rules would allow another one. Under ``bird_set`` repeated rows count once. All empty results have one hash.
    """
    texts = list(map(repr, rows))
    if any(".0" in text or "e+" in text for text in texts):  # there may be a float that is a whole number
        texts = [repr(tuple(map(_canonical, row))) for row in rows]
    lines = sorted(set(texts) if rule == "bird_set" else texts)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Hashable) -> Hashable:
    """Numbers that Python takes for equal become one: 1.0 and 1, -0.0 and 0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def gold_is_ordered(sql: str, dialect: str = "sqlite", *, as_test_suite: bool = False) -> bool:
    """Whether the order of the gold query's rows matters, that is, whether it has ORDER BY at its outermost level.

    The test-suite evaluator looks for the words "order by" anywhere in the text, so that an ORDER BY in a nested query or
    a window imposes an order that the question does not ask for; `as_test_suite=True` does the same. The two differ in 18
    of Spider's 6,779 available queries, and in no verdict of 800 published predictions.
    """
    if as_test_suite:
        return "order by" in sql.lower()
    from sqlglot.errors import ParseError  # here, because comparing rows needs no parser

    from finetune.sql.parsing import shared_tree

    try:
        return shared_tree(sql, dialect).args.get("order") is not None
    except ParseError:
        return has_order_by(sql, dialect=dialect)


@lru_cache(maxsize=1024)  # asked for each rule, of golds again and again
def as_rule_runs_it(sql: str, rule: Rule) -> str:
    """The query text that is executed under a rule."""
    if rule in ("test_suite", "test_suite_no_distinct"):
        return as_test_suite_runs_it(sql, keep_distinct=rule == "test_suite")
    return sql


def as_test_suite_runs_it(sql: str, *, keep_distinct: bool = True) -> str:
    """The query text that the test-suite evaluator passes to SQLite.

    It joins comparison operators that a tokenizer split, replaces MySQL's YEAR(CURDATE()) by 2020, and,
    unless `keep_distinct`, deletes DISTINCT.
    """
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    if not keep_distinct:
        sql = without_distinct(sql)
    return re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", "2020", sql, flags=re.IGNORECASE)
