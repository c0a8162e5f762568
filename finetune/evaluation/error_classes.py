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
    "Mostly a JOIN without its condition, as rows of every pair; if answers are merely slow, raise the limit in the section "
    "`evaluation`."
)
ERROR_CLASSES = {
    "no_sql": ErrorClass(
        "has no SQL", "The model does not answer in the prompt's form yet: train on more examples or for more steps."
    ),
    "too_long": ErrorClass(
        "exceeds the model's positions",
        "Shorten the prompt with data.schema_format: compact, or take a model with more positions.",
    ),
    "out_of_memory": ErrorClass(
        "did not fit into memory, even alone",
        "Use a machine with more memory, or shorten the prompt with data.schema_format: compact.",
    ),
    "syntax_error": ErrorClass(
        "does not parse",
        "Look whether answers are cut off at evaluation.max_new_tokens; else train on more examples or for more steps.",
    ),
    "no_such_table": ErrorClass(
        "names a table that the database does not have",
        "Check that the prompt's schema shows all tables (`finetune data check`); else train on more databases.",
    ),
    "column_of_another_table": ErrorClass(
        "asks a table for a column that only another table has",
        "Show which column belongs to which table and how tables are joined: a schema with its foreign keys in the prompt, "
        "data.schema_format: compact, more examples with JOIN.",
    ),
    "no_such_column": ErrorClass(
        "names a column that no table of the schema has",
        "Check that the prompt's schema is whole and not cut off; else train on more databases.",
    ),
    "no_such_alias": ErrorClass(
        "uses an alias that its FROM clause does not define",
        "A JOIN is missing: more training examples with two and more JOINs.",
    ),
    "ambiguous_column": ErrorClass(
        "names a column that several of its tables have, and not of which one",
        "Training examples that write the table before the column wherever there is a JOIN.",
    ),
    "no_such_function": ErrorClass(
        "calls a function that the database does not have",
        "The model writes another SQL dialect: name the dialect in the prompt (`dialect` of the records), and train on it.",
    ),
    "other_sql_error": ErrorClass("fails with another SQL error", "Read the errors in eval/*.jsonl."),
    "forbidden": ErrorClass(
        "does more than read", "Such a statement is never run; train on answers that are one SELECT."
    ),
    "empty_result": ErrorClass(
        "finds no rows where gold finds some",
        "Mostly a text constant that the data write otherwise: show values in the prompt, or give evidence.",
    ),
    "wrong_columns": ErrorClass(
        "selects other columns than gold, or more or fewer",
        "Compare with the questions whether they say which columns are wanted; more examples from the same authors teach it.",
    ),
    "wrong_order": ErrorClass(
        "finds the right rows in another order", "More training examples with ORDER BY and LIMIT."
    ),
    "wrong_rows": ErrorClass(
        "finds other rows than gold",
        "Conditions, joins or groups differ; read examples by difficulty before changing anything.",
    ),
    "timeout": ErrorClass("takes longer than the time limit", LIMIT_ADVICE),
    "too_large": ErrorClass("exceeds a limit of memory or size", LIMIT_ADVICE),
    "crashed": ErrorClass(
        "ends the process that runs or judges it", "Mostly for want of memory on this machine; judge it on a larger one."
    ),
    "gold_failed": ErrorClass("cannot be judged: gold does not run", GOLD_ADVICE),
    "gold_limit": ErrorClass("cannot be judged: gold hits a limit", GOLD_ADVICE),
    "gold_unstable": ErrorClass("cannot be judged: gold gives another result each time", GOLD_ADVICE),
    "unknown": ErrorClass("was judged by an earlier version", "Evaluate the run again."),
}  # fmt: skip
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


def _of_column(name: str, sql: str, schema: str, dialect: str) -> str:
    """The class for a column that SQLite does not find where the query asks for it. A name that has dots itself may be written
    like one with a table before it, so every ending of the text is tried."""
    name = name.strip().strip('"`').lower()
    parts = name.split(".")
    endings = {".".join(parts[start:]) for start in range(len(parts))}
    columns = _columns(schema, dialect)
    if len(parts) > 1 and name not in columns and not _is_defined(parts[-2], sql, dialect):
        tables = _tables(schema, dialect)
        return "column_of_another_table" if parts[-1] in tables.get(parts[-2], ()) else "no_such_alias"
    return "column_of_another_table" if endings & columns else "no_such_column"


def _is_defined(qualifier: str, sql: str, dialect: str) -> bool:
    """Whether the word stands in the query other than before a dot, so that it may be a table or an alias there."""
    code = [piece for piece in pieces(sql, dialect=dialect) if piece.is_code]
    after: Sequence[str] = [*(piece.text for piece in code[1:]), ""]
    names = (piece.text.strip('"`[]').lower() for piece in code)
    return any(name == qualifier and following != "." for name, following in zip(names, after, strict=True))


@lru_cache(maxsize=256)
def _tables(schema: str, dialect: str) -> dict[str, frozenset[str]]:
    """Tables and their columns in lower case; empty if the schema cannot be read."""
    try:
        tables = parse_ddl(schema, dialect)
    except UserError:
        return {}
    return {table.name.lower(): frozenset(column.name.lower() for column in table.columns) for table in tables}


def _columns(schema: str, dialect: str) -> frozenset[str]:
    return frozenset().union(*_tables(schema, dialect).values())


def as_error_class(verdict: str, recorded: str | None) -> str | None:
    """The class of a row, also of one that an earlier version wrote without its class."""
    if recorded or verdict == "correct":
        return recorded
    return "unknown" if verdict in ("sql_error", "wrong_rows") else verdict
