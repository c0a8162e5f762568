"""Parses SQL into a syntax tree and checks that it is exactly one query. Queries reach sqlglot's parser only through here."""

import logging
import re

import sqlglot
from sqlglot import exp
from sqlglot.errors import ParseError, TokenError

from finetune.errors import UserError

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns about statements that are rejected anyway


def parses(sql: str, dialect: str = "sqlite") -> str | None:
    """None if the text is exactly one query of the dialect, else one line that says what is wrong and where.

    A query is SELECT, VALUES, or a combination of them. Names are not resolved; the sandbox does that.
    Raises UserError for a dialect that sqlglot does not know.
    """
    try:
        query_tree(sql, dialect)
    except ParseError as error:
        return str(error)
    return None


def query_tree(sql: str, dialect: str = "sqlite") -> exp.Expr:
    """The syntax tree of a text that is one query, without parentheses around the whole query.

    Raises ParseError with a one-line message otherwise, and UserError for an unknown dialect.
    """
    statements = [statement for statement in parse_statements(sql, dialect) if statement is not None]
    if not statements:
        raise ParseError("there is no statement")
    if len(statements) > 1:
        raise ParseError(f"there are {len(statements)} statements, not one")
    tree = statements[0]
    while isinstance(tree, exp.Subquery | exp.Paren) and not tree.alias:
        tree = tree.this
    if not isinstance(tree, exp.Query | exp.Values):
        if isinstance(tree, exp.Condition | exp.Alias):
            raise ParseError("it is an expression, not a query")
        raise ParseError(f"it is a {tree.key.upper()} statement, not a query")
    return tree


def parse_statements(sql: str, dialect: str) -> list[exp.Expr | None]:
    """The syntax trees of all statements in the text. Raises as `query_tree` does."""
    try:
        sqlglot.Dialect.get_or_raise(dialect)
    except ValueError as error:
        raise UserError(f"SQL dialect {dialect!r}: {error}", code="sql.unknown_dialect") from None
    try:
        return list(sqlglot.parse(sql, read=dialect))
    except (ParseError, TokenError) as error:
        raise ParseError(_one_line(error)) from None
    except RecursionError:
        raise ParseError("it is nested too deeply") from None


def _one_line(error: ParseError | TokenError) -> str:
    details = error.errors[0] if isinstance(error, ParseError) and error.errors else {}
    missing = re.fullmatch(r"Missing (.+) from (\d+):(\d+)", str(error.__cause__))
    if missing:
        message = f"line {missing[2]}, column {missing[3]}: {missing[1]} is not closed"
    elif details.get("line"):
        message = f"line {details['line']}, column {details['col']}: {details['description']}"
        message += f" near {details['highlight']!r}" if details.get("highlight") else ""
    elif isinstance(error.__cause__, IndexError):
        message = "the text ends inside a quote or a comment"
    else:
        message = str(error)
    return " ".join(re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", message).split())
