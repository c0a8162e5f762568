"""A schema file, such as a dump, as the statements that prompts show, whatever dialect it turns out to be written in."""

import re
from collections.abc import Sequence

from finetune.errors import UserError
from finetune.sql.schema import parse_ddl, schema_of_script
from finetune.sql.text import on_one_line, shortened, statements

READERS = ("postgres", "mysql", "tsql", "snowflake", "bigquery", "duckdb", "oracle", "sqlite")
"""Dialects that are tried for a text that cannot be read in the one that was expected."""
_NAME = r'(?:"[^"]*"|\w+)(?:\s*\.\s*(?:"[^"]*"|\w+))*'
_SHOWN = re.compile(
    r"(?:CREATE\b(?:\s+(?!AS\b)\w+){0,6}?\s+(?:TABLE|VIEW)|ALTER\s+TABLE|COMMENT\s+ON)\b"
    rf"|CREATE\s+(?:TYPE\s+{_NAME}\s+AS\s*(?:ENUM\b|\()|DOMAIN\s)|ALTER\s+TYPE\s+{_NAME}\s+(?:ADD|RENAME)\s+VALUE\b",
    re.IGNORECASE,
)
_VIEW = re.compile(r"CREATE\b[^(;]*?\bVIEW\s+(?=(\S+)\s*(?:\(|\bAS\b))", re.IGNORECASE)
_TYPE = re.compile(r"CREATE\s+(?:OR\s+REPLACE\s+)?(?:TYPE|DOMAIN)\s+([^\s(;]+)", re.IGNORECASE)


def readable_schema(text: str, dialect: str) -> tuple[str, str]:
    """The schema, one statement per line, and the dialect that reads it: the given one, else the first of READERS that does.

    Raises UserError for a text without tables, and for one that no dialect reads: then with the message of the given one.
    """
    try:
        return _shown(text, dialect), dialect
    except UserError as error:
        for other in READERS if error.code == "sql.bad_schema" else ():
            try:
                return _shown(text, other), other
            except UserError:
                continue
        raise


def types_not_shown(text: str, dialect: str) -> list[str]:
    """The names of the types that a schema file creates and `readable_schema` leaves out: not enums, composite types and domains.

    dialect: that reads the file.
    """
    found = [_TYPE.match(line) for line in _lines(text, dialect) if dialect == "sqlite" or not _SHOWN.match(line)]
    return list(dict.fromkeys(match[1] for match in found if match))


def _shown(text: str, dialect: str) -> str:
    if dialect == "sqlite":
        shown = schema_of_script(text)
    else:
        parse_ddl(text, dialect)
        shown = "\n".join(line for line in _lines(text, dialect) if _SHOWN.match(line))
    if not shown:
        raise UserError(
            f"schema: its statements cannot be told apart, in: {shortened(text, dialect=dialect)}",
            code="sql.bad_schema",
        )
    return shown


def _lines(text: str, dialect: str) -> list[str]:
    """The statements of a script, a line each.

    Dumps end them also by other signs than semicolons (GO, /), and hold rows that are no SQL (COPY). Of MySQL's comments that a
    server runs (/*!50001 CREATE VIEW ... */) there are the views: a dump makes each twice, and the last has its query.
    """
    found = statements(text, dialect=dialect)
    if dialect != "sqlite":
        from sqlglot.dialects import MySQL
        from sqlglot.dialects.dialect import Dialect

        from finetune.sql.ddl.script import split_script

        reader = Dialect.get_or_raise(dialect)
        split = [f"{statement.text};" for statement in split_script(text, reader)]
        found = [*found, *_views(split, found)] if isinstance(reader, MySQL) else split
    return [on_one_line(statement, dialect=dialect) for statement in found]


def _views(split: Sequence[str], there: Sequence[str]) -> list[str]:
    """The last CREATE VIEW of each view that is not there already, without MySQL's ALGORITHM, DEFINER and SQL SECURITY."""
    views = {match[1]: f"CREATE VIEW {text[match.end() :]}" for text in split if (match := _VIEW.match(text))}
    known = {match[1] for text in there if (match := _VIEW.match(on_one_line(text, dialect="mysql")))}
    return [text for name, text in views.items() if name not in known]
