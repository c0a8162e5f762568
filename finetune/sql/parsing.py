"""Parses SQL into a syntax tree and checks that it is exactly one query. Queries reach sqlglot's parser only through here.

The work is limited: the size of a statement before anything reads it, its words and signs before sqlglot does, and sqlglot's
steps, because it tries alternatives one inside the other, so that forty words (`a JOIN a JOIN a ...`) could take it years.
"""

import logging
import re
from functools import cache, lru_cache
from itertools import islice
from typing import Any

from sqlglot import Dialect, exp
from sqlglot.errors import ParseError, TokenError
from sqlglot.parser import Parser

from finetune.sql.dialects import dialect_name
from finetune.sql.lexer import pieces, too_long, unclosed
from finetune.sql.text import statements

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns about statements that are rejected anyway

MAX_WORDS = 100_000
"""Words, signs and quoted texts of one statement; sqlglot needs about 1 KB of memory for each."""
MAX_STEPS = 250_000
"""Steps from word to word that sqlglot may make in addition to ten a word; a second or so. The queries of Spider and BIRD need
1 to 3 a word."""

_CHANGES = (exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.Create, exp.Drop, exp.Alter)
_MAY_CHANGE = re.compile("insert|update|delete|merge|create|drop|alter|into|replace", re.IGNORECASE).search
"""Without any of these words no node of the tree is a change, which spares a walk through it."""
_NO_QUERY_WORDS = """
    alter analyze attach begin call cluster comment commit copy create deallocate declare delete desc describe detach do
    drop end exec execute explain export grant if insert install kill load lock merge msck optimize pragma prepare refresh
    reindex release rename replace reset revoke rollback savepoint set show start truncate uncache unload unlock update
    upsert use vacuum while
"""
_NO_QUERY = frozenset(_NO_QUERY_WORDS.split())
"""First words of statements that are no query, in any dialect."""


class NotAQueryError(ParseError):
    """The text is SQL, but another statement than a query, or it holds one."""


class _TooManySteps(Exception):
    """Not a ParseError, because sqlglot catches those to try the next alternative."""


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

    Raises ParseError with a one-line message otherwise (NotAQueryError if it is another statement), and UserError for an
    unknown dialect.
    """
    try:
        trees = [tree for tree in parse_statements(sql, dialect) if tree is not None]
    except NotAQueryError:
        raise
    except ParseError:
        if other := other_statement(sql, dialect):
            raise NotAQueryError(f"it is a {other} statement, not a query") from None
        raise
    if not trees:
        raise ParseError("there is no statement")
    if len(trees) > 1:
        kind = NotAQueryError if other_statement(sql, dialect) else ParseError
        raise kind(f"there are {len(trees)} statements, not one")
    tree = trees[0]
    while isinstance(tree, exp.Subquery | exp.Paren) and not tree.alias:
        tree = tree.this
    if not isinstance(tree, exp.Query | exp.Values):
        if isinstance(tree, exp.Condition | exp.Alias):
            raise ParseError("it is an expression, not a query")
        raise NotAQueryError(f"it is a {other_statement(sql, dialect) or tree.key.upper()} statement, not a query")
    if _MAY_CHANGE(sql) and (change := tree.find(*_CHANGES, exp.Into)):
        what = "writes what it selects (INTO)" if isinstance(change, exp.Into) else f"holds a {change.key.upper()}"
        raise NotAQueryError(f"it {what}, so it is not only a query")
    if problem := unclosed(sql, dialect=dialect):
        raise ParseError(problem)
    return tree


def shared_tree(sql: str, dialect: str = "sqlite") -> exp.Expr:
    """As `query_tree`, but a query that several parts of the program look at is parsed once: do not change the tree."""
    found = _tree_or_error(sql, dialect)
    if isinstance(found, ParseError):
        raise type(found)(*found.args)
    return found


@lru_cache(maxsize=64)
def _tree_or_error(sql: str, dialect: str) -> exp.Expr | ParseError:
    try:
        return query_tree(sql, dialect)
    except ParseError as error:
        return error.with_traceback(None)


def other_statement(sql: str, dialect: str = "sqlite") -> str | None:
    """The first word of the first statement in the text that is no query, such as INSERT; None if there is none.

    Only first words are looked at, so that it also works where sqlglot cannot parse the statement.
    """
    if too_long(sql):
        return None
    for statement in statements(sql, dialect=dialect):
        first = next((piece.word for piece in pieces(statement, dialect=dialect) if piece.is_code), "")
        if first in _NO_QUERY:
            return first.upper()
    return None


def same_tree(one: exp.Expr, sql: str, dialect: str) -> bool:
    """Whether the text is a query with this syntax tree; comments do not count."""
    try:
        return bool(one == query_tree(sql, dialect))
    except (ParseError, RecursionError):
        return False


def parse_statements(sql: str, dialect: str) -> list[exp.Expr | None]:
    """The syntax trees of all statements in the text. Raises as `query_tree` does."""
    name = dialect_name(dialect)
    if problem := too_long(sql):
        raise ParseError(problem)
    if len(sql) > MAX_WORDS:  # a shorter text cannot have as many
        code = (piece for piece in pieces(sql, dialect=name) if piece.is_code)
        if sum(1 for _ in islice(code, MAX_WORDS + 1)) > MAX_WORDS:
            raise ParseError(f"it has more than {MAX_WORDS:,} words and signs")
    known = Dialect.get_or_raise(name)
    try:
        words = known.tokenize(sql)
        trees = _with_limit(known.parser(), MAX_STEPS + 10 * len(words)).parse(words, sql)
        return [tree for tree in trees if not isinstance(tree, exp.Semicolon)]  # a comment after the last statement
    except (ParseError, TokenError) as error:
        raise ParseError(_one_line(error)) from None
    except RecursionError:
        raise ParseError("it is nested too deeply") from None
    except _TooManySteps:
        raise ParseError("it is nested so that parsing it takes too long") from None


def _with_limit(parser: Parser, steps: int) -> Any:
    """A parser of the same dialect that raises _TooManySteps after this number of steps."""
    parser_class: Any = type(parser)
    limited = _limited(parser_class)(dialect=parser.dialect)
    limited.steps_left = steps
    for name, inner in vars(limited).items():  # Athena's passes each statement on to one of two others
        if isinstance(inner, Parser):
            setattr(limited, name, _with_limit(inner, steps))
    return limited


@cache
def _limited(parser_class: Any) -> Any:
    advance = parser_class._advance  # called at every step, so without super()

    class Limited(parser_class):  # type: ignore[misc]
        steps_left = 0

        def _advance(self, times: int = 1) -> None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise _TooManySteps
            advance(self, times)

    return Limited


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
