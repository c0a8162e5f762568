"""What is wrong with an answer, more precisely than its verdict: the error class of a question, and what to do about it.

A class follows from the verdict; for SQL that fails, from SQLite's message and the record's schema; for SQL that runs, from its
rows and those of the gold query. Each answer that is not correct has exactly one class, the first that fits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from finetune.errors import UserError
from finetune.sql.columns import equal_in_some_column_order
from finetune.sql.compare import Rows, Rule
from finetune.sql.lexer import pieces
from finetune.sql.schema import parse_ddl


class ErrorClass(NamedTuple):
    """title: as a sentence about an answer goes on: "it ...". advice: what one may do about many of them."""

    title: str
    advice: str


GOLD_ADVICE = "No answer can be right: correct or remove the record; `finetune data check` lists such records."
LIMIT_ADVICE = (
    "Look for a JOIN without its condition; if the query is merely slow, raise its limit in the section `evaluation`."
)
ERROR_CLASSES = {
    "no_sql": ErrorClass(
        "has no SQL", "Read answers in eval/*.jsonl; the model does not know the form yet: train longer."
    ),
    "too_long": ErrorClass(
        "exceeds the model's positions",
        "Shorten the prompt with data.schema_format: compact, or take a model with more positions.",
    ),
    "out_of_memory": ErrorClass(
        "did not fit into memory, even alone",
        "Use a machine with more memory, or shorten the prompt with data.schema_format: compact.",
    ),
    "failed": ErrorClass(
        "was refused by the generator", "Read the generator's messages; the next evaluation asks it again."
    ),
    "syntax_error": ErrorClass(
        "does not parse", "Look whether answers are cut off at evaluation.max_new_tokens; if not, train longer."
    ),
    "no_such_table": ErrorClass(
        "names a table that the database does not have",
        "Check that the schema in the prompt shows all tables (`finetune data check`); if so, train on more databases.",
    ),
    "column_of_another_table": ErrorClass(
        "asks a table for a column that only another one has",
        "Show which table has which column and how they are joined: foreign keys in the schema, data.schema_format: compact, "
        "more examples with JOIN.",
    ),
    "no_such_column": ErrorClass(
        "names a column that no table of the schema has",
        "Check that the schema in the prompt is whole; if so, train on more databases.",
    ),
    "no_such_alias": ErrorClass(
        "uses a table or an alias that its FROM clause does not have", "More training examples with two and more JOINs."
    ),
    "ambiguous_column": ErrorClass(
        "names a column that several of its tables have, and not of which",
        "More training examples that write the table before the column.",
    ),
    "no_such_function": ErrorClass(
        "calls a function that the database does not have",
        "The SQL is of another dialect: check `dialect` of the records, and that gold queries use the functions of this one.",
    ),
    "other_sql_error": ErrorClass("fails with another SQL error", "Read the errors in eval/*.jsonl."),
    "forbidden": ErrorClass(
        "does more than read", "Such a statement is never run; train on answers that are one SELECT."
    ),
    "empty_result": ErrorClass(
        "finds no rows where gold finds some",
        "Compare text constants with the data, which may write them otherwise; evidence in the records can tell.",
    ),
    "wrong_columns": ErrorClass(
        "selects other columns than gold, or more or fewer",
        "Read whether the questions say which columns they want; if so, train on more examples of the same source.",
    ),
    "wrong_order": ErrorClass("finds the right rows in another order", "More training examples with ORDER BY."),
    "wrong_rows": ErrorClass(
        "finds other rows than gold", "Read examples by difficulty: conditions, joins or groups differ."
    ),
    "timeout": ErrorClass("takes longer than the time limit", LIMIT_ADVICE),
    "too_large": ErrorClass("exceeds a limit of memory or size", LIMIT_ADVICE),
    "crashed": ErrorClass(
        "ends the process that runs or judges it", "Judge the answers again on a machine with more memory."
    ),
    "gold_failed": ErrorClass("cannot be judged: gold does not run", GOLD_ADVICE),
    "gold_limit": ErrorClass("cannot be judged: gold hits a limit", GOLD_ADVICE),
    "gold_unstable": ErrorClass("cannot be judged: gold gives another result each time", GOLD_ADVICE),
    "unknown": ErrorClass("was judged by an earlier version", "Evaluate the run again, which asks no model."),
}
"""Name -> what it means, in the order in which an answer is looked at."""

_SYNTAX = re.compile(
    r"syntax error|^incomplete input|^unrecognized token|^parser stack overflow|^no SQL statement|^the query contains a null"
)
_TABLE = re.compile(r"^no such table: ")
_COLUMN = re.compile(
    r"^no such column: (?P<name>.*?)(?: - should this be a string literal.*)?$"
    r"|^cannot join using column (?P<joined>.*) - column not present in both tables$"
)
_AMBIGUOUS = re.compile(r"^ambiguous column name: ")
_FUNCTION = re.compile(r"^no such function: |^wrong number of arguments to function ")


def error_class(verdict: str, error: str | None, sql: str, schema: str, dialect: str) -> str | None:
    """The class of an answer without rows to compare, by its verdict and the error message; None if it is correct.

    schema: the record's DDL. `wrong_rows` needs the rows: see `class_of_rows`.
    """
    if verdict == "correct":
        return None
    if verdict != "sql_error":
        return verdict if verdict in ERROR_CLASSES else "unknown"
    message = error or ""
    if _SYNTAX.search(message):
        return "syntax_error"
    if _TABLE.match(message):
        return "no_such_table"
    if _AMBIGUOUS.match(message):
        return "ambiguous_column"
    if _FUNCTION.match(message):
        return "no_such_function"
    if column := _COLUMN.match(message):
        return _of_column(column["name"] or column["joined"], sql, schema, dialect)
    return "other_sql_error"


def class_of_rows(gold: Rows, found: Rows, *, ordered: bool, rule: Rule) -> str:
    """The class of an answer whose rows are not those of gold under the rule. ordered: whether gold orders its rows."""
    if not found:
        return "empty_result"
    if not gold:
        return "wrong_rows"
    if len(gold[0]) != len(found[0]):
        return "wrong_columns"
    same_rows = len(gold) == len(found)
    if same_rows and ordered and rule != "bird_set" and Counter(gold) == Counter(found):
        return "wrong_order"
    if same_rows and equal_in_some_column_order(gold, found):
        return "wrong_order" if ordered and rule not in ("bird_set", "strict") else "wrong_columns"
    return "wrong_columns" if same_rows and _some_columns_agree(gold, found) else "wrong_rows"


def _some_columns_agree(gold: Rows, found: Rows) -> bool:
    """Whether the results are the same rows, seen through the columns that both have: each row of one then has its counterpart
    in the other, but for a column that gold selects otherwise."""
    wanted = [Counter(column) for column in zip(*gold, strict=True)]
    left = list(range(len(wanted)))
    pairs: list[tuple[int, int]] = []
    for number, column in enumerate(zip(*found, strict=True)):
        values = Counter(column)
        match = next((place for place in left if wanted[place] == values), None)
        if match is not None:
            left.remove(match)
            pairs.append((match, number))
    if not pairs or len(pairs) == len(wanted):
        return False
    return Counter(tuple(row[place] for place, _ in pairs) for row in gold) == Counter(
        tuple(row[number] for _, number in pairs) for row in found
    )


def _of_column(written: str, sql: str, schema: str, dialect: str) -> str:
    """The class for a column that SQLite does not find where the query asks for it. written: as SQLite's message has it, without
    quotes: T1.name, or a name with dots of its own."""
    code = [piece for piece in pieces(sql, dialect=dialect) if piece.is_code]
    names = [piece.text.strip('"`[]').lower() for piece in code]
    table, column = _parts(written.strip().strip('"`').lower(), set(names))
    tables = _tables(schema, dialect)
    if table and not _is_defined(table, names):
        return "column_of_another_table" if column in tables.get(table, ()) else "no_such_alias"
    return "column_of_another_table" if any(column in columns for columns in tables.values()) else "no_such_column"


def _parts(written: str, names: set[str]) -> tuple[str, str]:
    """Table ("" for none) and column, cut where the query writes both as names of their own."""
    cuts = [("", written), *((written[: dot.start()], written[dot.end() :]) for dot in re.finditer(r"\.", written))]
    return next(
        ((table.rpartition(".")[2], column) for table, column in cuts if column in names),
        (written.rpartition(".")[0].rpartition(".")[2], written.rpartition(".")[2]),
    )


def _is_defined(table: str, names: Sequence[str]) -> bool:
    """Whether the word stands in the query other than before a dot, so that it may be a table or an alias there."""
    return any(name == table and after != "." for name, after in zip(names, [*names[1:], ""], strict=True))


@lru_cache(maxsize=256)
def _tables(schema: str, dialect: str) -> dict[str, frozenset[str]]:
    """Tables and their columns in lower case; empty if the schema cannot be read."""
    try:
        tables = parse_ddl(schema, dialect)
    except UserError:
        return {}
    return {table.name.lower(): frozenset(column.name.lower() for column in table.columns) for table in tables}


def as_error_class(verdict: str, recorded: str | None) -> str | None:
    """The class of a row, also of one that an earlier version wrote without its class."""
    if recorded or verdict == "correct":
        return recorded
    return "unknown" if verdict in ("sql_error", "wrong_rows") else verdict
