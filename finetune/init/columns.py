"""Which column of a table is the question, which the SQL, the schema, ...: by the content of the cells first, by names second."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import UserError, shown
from finetune.init.rows import Rows
from finetune.sql.parsing import parses
from finetune.sql.text import is_select

Kind = Literal["sql", "ddl", "prose", "other", "empty"]
Field = Literal["question", "sql", "schema", "db_id", "evidence", "split", "id"]
NEEDED: tuple[Field, ...] = ("question", "sql")
BY_NAME: tuple[Field, ...] = ("evidence", "db_id", "split", "id")

NAMES: dict[Field, tuple[str, ...]] = {
    "question": (
        *(
            "question",
            "nl question",
            "natural language question",
            "nlq",
            "user question",
            "utterance",
            "nl",
            "natural language",
        ),
        *("prompt", "instruction", "request", "input", "text", "user", "frage", "pregunta", "domanda"),
    ),
    "sql": (
        *("sql", "gold sql", "sql query", "gold query", "query", "gold", "target sql", "sql statement", "statement"),
        *("answer", "response", "completion", "output", "target", "label", "solution", "abfrage", "consulta"),
    ),
    "schema": (
        "schema",
        "ddl",
        "sql context",
        "context",
        "create table",
        "create statements",
        "db schema",
        "table schema",
        "tables",
    ),
    "db_id": ("db id", "db", "database", "database id", "db name", "database name", "dbid"),
    "evidence": ("evidence", "external knowledge", "knowledge", "hint"),
    "split": ("split", "partition", "fold", "subset"),
    "id": ("id", "question id", "example id", "uid", "idx", "index", "key"),
}
"""The names under which data sets have each field, the more telling ones first; in lower case, with spaces for _ - and case."""
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
SAMPLE = 60
"""Cells of a column that are looked at, spread over the file."""
MOST = 0.8
"""Share of a column's filled cells that make its kind."""
DIALECTS = ("sqlite", "postgres", "mysql", "tsql", "bigquery", "snowflake")
"""Tried one after the other where nothing says in which dialect the SQL is."""
_DDL = re.compile(r"\s*(?:--[^\n]*\n\s*)*CREATE\b[\s\w]*?\b(?:TABLE|VIEW)\b", re.IGNORECASE)
_PROSE = frozenset(("the", "these", "those", "this", "that", "which", "we", "our", "your", "me", "here"))
"""Words of prose that hardly any query has."""
_NO_PROSE = re.compile(r"[\w.:/\\+-]*", re.ASCII)


@dataclass(frozen=True)
class Mapped:
    """columns: our field -> column of the file. dialect: in which the SQL was found to parse. why: a line for the user."""

    columns: dict[Field, str]
    dialect: str
    why: str


def map_columns(table: Rows, dialect: str | None, given: Sequence[str] = ()) -> Mapped:
    """dialect: of the SQL, None if unknown. given: FIELD=COLUMN as typed, which are not looked for.

    Raises UserError that lists the columns and what is in them if question and SQL cannot be told apart.
    """
    typed = _typed(table, given)
    free = [column for column in table.columns if column not in typed.values()]
    cells = {column: _sample(row.get(column) for row in table.rows) for column in table.columns}
    kinds = {column: kind_of_cells(cells[column]) for column in table.columns}
    columns = dict(typed)
    for field in NEEDED:  # of a form that nobody has filled in yet, which is an error of its own
        if field not in columns and kinds.get(field) == "empty" and field in free:
            columns[field] = field
    _choose(columns, "sql", [column for column in free if kinds[column] == "sql"], table, kinds)
    _choose(columns, "schema", [column for column in free if kinds[column] == "ddl"], table, kinds)
    for field in BY_NAME:
        _choose_by_name(columns, field, [column for column in free if _fits(field, cells[column])])
    left = [column for column in free if column not in columns.values() and kinds[column] == "prose"]
    _choose(columns, "question", left, table, kinds)
    for field in NEEDED:
        if field not in columns:
            what = "SQL" if field == "sql" else "a question"
            raise _cannot_tell(table, kinds, f"no column reads as {what}", field)
    if _kind(columns["sql"]) == "sql":
        raise UserError(
            f"--data {table.path}: the first line is a pair ({shown(columns['sql'])}), not the names of the columns; write "
            "such a line above it, like `question,sql`",
            code="init.no_header",
        )
    return Mapped(columns, dialect or spoken_dialect(cells[columns["sql"]]), _why(table, columns, typed))


def spoken_dialect(queries: Sequence[str]) -> str:
    """The dialect in which most of the queries parse; of several, the first of DIALECTS."""

    def parsed(dialect: str) -> int:
        return sum(parses(sql.strip().rstrip(";"), dialect) is None for sql in queries)

    best, most = DIALECTS[0], -1
    for dialect in DIALECTS:
        if (count := parsed(dialect)) > most:
            best, most = dialect, count
        if most == len(queries):
            break
    return best


def kind_of_cells(cells: Sequence[str]) -> Kind:
    """What most of the filled cells of a column are."""
    if not cells:
        return "empty"
    kind, count = Counter(map(_kind, cells)).most_common(1)[0]
    return kind if count >= MOST * len(cells) else "other"


def plain(name: str) -> str:
    """A column's name in the form of NAMES: `goldSQL` and `gold_sql` are `gold sql`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[\W_]+", " ", spaced).lower().split())


def _kind(cell: str) -> Kind:
    if _DDL.match(cell):
        return "ddl"
    if is_select(cell) and _reads_as_sql(cell.strip()):
        return "sql"
    return "other" if _NO_PROSE.fullmatch(cell.strip()) or not any(letter.isalpha() for letter in cell) else "prose"


def _reads_as_sql(cell: str) -> bool:
    """Also where it does not parse: whether it is right is another question. `Select the names from the list` is none."""
    words = cell.lower().split()
    if cell.endswith("?") or not _PROSE.isdisjoint(words):
        return False
    return "from" in words or parses(cell.rstrip(";")) is None


def _sample(values: Iterable[Any]) -> list[str]:
    filled = [str(value) for value in values if value is not None and str(value).strip()]
    step = max(1, len(filled) // SAMPLE)
    return filled[::step][:SAMPLE]


def _typed(table: Rows, given: Sequence[str]) -> dict[Field, str]:
    found: dict[Field, str] = {}
    for pair in given:
        field, equals, column = pair.partition("=")
        if not equals or field not in NAMES:
            raise UserError(
                f"--column {pair}: expected FIELD=COLUMN, with one of {', '.join(NAMES)} as the field",
                code="init.bad_column",
            )
        if column not in table.columns:
            names = ", ".join(map(shown, table.columns))
            raise UserError(f"--column {pair}: {table.path} has no such column; it has {names}", code="init.bad_column")
        found[field] = column
    return found


def _choose(
    columns: dict[Field, str], field: Field, candidates: list[str], table: Rows, kinds: Mapping[str, Kind]
) -> None:
    """The only candidate, or the one with the most telling name. Raises UserError if several could be meant."""
    if field in columns or not candidates:
        return
    names = NAMES[field]
    by_name = sorted((names.index(plain(column)), column) for column in candidates if plain(column) in names)
    if len(candidates) > 1 and not by_name:
        which = " and ".join(map(shown, candidates))
        raise _cannot_tell(table, kinds, f"{which} could each be the {'SQL' if field == 'sql' else field}", field)
    columns[field] = by_name[0][1] if by_name else candidates[0]


def _choose_by_name(columns: dict[Field, str], field: Field, candidates: list[str]) -> None:
    names = NAMES[field]
    found = sorted((names.index(plain(column)), column) for column in candidates if plain(column) in names)
    left = [column for _, column in found if column not in columns.values()]
    if field not in columns and left:
        columns[field] = left[0]


def _fits(field: Field, cells: Sequence[str]) -> bool:
    if field == "split":
        return bool(cells) and all(cell.strip().lower() in SPLITS for cell in cells)
    if field == "db_id":
        return bool(cells) and not any(re.search(r"[/\\\0\n]", cell) for cell in cells)
    return bool(cells)


def _cannot_tell(table: Rows, kinds: Mapping[str, Kind], what: str, field: Field) -> UserError:
    words = {
        "sql": "SQL",
        "ddl": "CREATE TABLE text",
        "prose": "prose",
        "other": "neither prose nor SQL",
        "empty": "empty",
    }
    listed = ", ".join(f"{shown(column)} ({words[kinds[column]]})" for column in table.columns)
    return UserError(
        f"--data {table.path}: {what}: its columns are {listed}; name it with --column {field}=NAME",
        code="init.which_column",
    )


def _why(table: Rows, columns: Mapping[Field, str], typed: Mapping[Field, str]) -> str:
    pairs = ", ".join(
        f"{field} = {shown(column)}{'' if field not in typed else ' (as typed)'}" for field, column in columns.items()
    )
    ignored = [column for column in table.columns if column not in columns.values()]
    rest = f"; not used: {', '.join(map(shown, ignored))}" if ignored else ""
    return f"{table.path}: {pairs}{rest}; --column FIELD=NAME chooses another"
