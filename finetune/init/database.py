"""What --db gives: a SQLite file, a folder of them, or a schema as SQL text, such as a dump of PostgreSQL."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError, shown
from finetune.runtime.commands import as_command
from finetune.runtime.files import kind_of, read_text
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import ENGINES
from finetune.sql.engines.sqlite_file import SQLITE_HEADER
from finetune.sql.quoting import quoted
from finetune.sql.schema import parse_ddl
from finetune.sql.schema_text import readable_schema, types_not_shown
from finetune.sql.tables import Table

ENGINE = ENGINES["sqlite"]
COPIED_BYTES = 64 << 20
"""A larger database is linked to, not copied: `data prepare` reads it where it is."""
SECONDS = 2.0
"""For a look at one table."""
DUMPS = {"-- PostgreSQL database": "postgres", "-- MySQL dump": "mysql", "-- MariaDB dump": "mysql"}
"""How the dumps of database servers begin -> their dialect."""
_SIGNS = {
    "postgres": r"::|\b(?:big|small)?serial\b|\bjsonb\b|\btimestamptz\b|\bcharacter varying\b|\w\[\]|\bpublic\."
    r"|\bAS\s+ENUM\b|\bCREATE\s+DOMAIN\b",
    "mysql": r"\bENGINE\s*=|\bAUTO_INCREMENT\b|\bunsigned\b",
    "tsql": r"\bdbo\b|\bIDENTITY\s*\(|\bnvarchar\b|^GO$",
    "oracle": r"\bVARCHAR2\b",
}
"""Words that only one of the usual dialects has, for a schema that does not begin like a dump."""
_SIZES = struct.Struct(">16xH6xII60xI")
"""Of a SQLite header: bytes of a page, change counter, pages, version-valid-for (https://sqlite.org/fileformat2.html)."""


@dataclass(frozen=True)
class Database:
    """schemas: DDL by db_id. dialect: that reads it. filled: the tables that have rows, of one SQLite file; None if nothing can
    be executed. bytes: of the file, 0 for a schema. unshown: the types of a schema file that prompts do not show."""

    path: Path
    db_id: str
    schemas: dict[str, str]
    dialect: str
    filled: frozenset[str] | None = None
    bytes: int = 0
    is_folder: bool = False
    unshown: tuple[str, ...] = ()

    @property
    def is_executable(self) -> bool:
        return self.filled is not None or self.is_folder

    @property
    def is_linked(self) -> bool:
        return self.bytes > COPIED_BYTES

    @property
    def tables(self) -> tuple[Table, ...]:
        return parse_ddl(self.schemas[self.db_id], self.dialect) if self.schemas.get(self.db_id) else ()


def look_at_database(path: Path, dialect: str | None = None) -> Database:
    """dialect: of a schema, if the user has named it. Raises UserError that says what is there instead."""
    if address := _ADDRESS.match(str(path)):
        raise UserError(
            f"--db {address[1]}://...: the address of a server, which is not asked; {_EXPECTED}",
            code="init.no_database",
        )
    kind = kind_of(path)
    if kind == "a folder":
        return _folder(path)
    if kind != "a file":
        raise UserError(
            f"--db {path}: {'no such file' if kind == 'nothing' else kind}; {_EXPECTED}", code="init.no_database"
        )
    try:
        with path.open("rb") as file:
            start = file.read(100)
    except OSError as error:
        raise UserError(f"--db {path}: cannot be read ({error.strerror})", code="init.unreadable_database") from None
    if start.startswith(SQLITE_HEADER):
        return _sqlite(path, start)
    if start.startswith(b"PGDMP"):
        raise UserError(
            f"--db {path}: a PostgreSQL dump that is no text; make one with "
            f"`{as_command('pg_restore', '--schema-only', '-f', 'schema.sql', path)}`",
            code="init.not_a_database",
        )
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise UserError(
            f"--db {path}: no database; questions with their SQL are given with --data; {_EXPECTED}",
            code="init.not_a_database",
        )
    if path.suffix.lower() in (".sqlite", ".sqlite3", ".db", ".db3") or b"\0" in start or not start:
        why = "it is empty" if not start else "is it encrypted, or another program's database?"
        raise UserError(f"--db {path}: not a SQLite file ({why}); {_EXPECTED}", code="init.not_a_database")
    return _schema(path, dialect)


_ADDRESS = re.compile(r"([a-z][a-z+]+):/+[^/]", re.IGNORECASE)
"""Of a database server; a path has lost one of the two slashes. The rest of it may hold a password."""
_EXPECTED = (
    "expected a SQLite file, a folder of <db_id>/<db_id>.sqlite, or a schema as .sql text (pg_dump --schema-only)"
)


def database_name(path: Path) -> str:
    """A db_id, which names a folder, from a file's name."""
    return re.sub(r"[^\w-]+", "_", path.stem).strip("_-")[:60] or "database"


def _sqlite(path: Path, header: bytes) -> Database:
    size = path.stat().st_size
    if size < _SIZES.size:
        raise UserError(
            f"--db {path}: has {size:,} bytes, fewer than its header: a copy that was cut off; copy it again",
            code="init.truncated_database",
        )
    page, changes, pages, valid_for = _SIZES.unpack_from(header.ljust(_SIZES.size, b"\0"))
    expected = (65536 if page == 1 else page) * pages
    log = path.resolve().with_name(path.resolve().name + "-wal")
    if changes == valid_for and expected > size and not (log.is_file() and log.stat().st_size):
        raise UserError(
            f"--db {path}: has {size:,} bytes of the {expected:,} that its header names: a copy that was cut off; copy it again",
            code="init.truncated_database",
        )
    schema = ENGINE.schema(path)
    tables = parse_ddl(schema)
    filled = set[str]()
    with ENGINE.open(Limits()) as session:
        for table in tables:
            result = session.run(path, f"SELECT 1 FROM {quoted(table.name)} LIMIT 1", SECONDS)
            if result.rows:
                filled.add(table.name)
    name = database_name(path)
    return Database(
        path, name, {name: schema}, "sqlite", frozenset(filled), size + (log.stat().st_size if log.is_file() else 0)
    )


def _folder(path: Path) -> Database:
    files = sorted(file for file in path.glob("*/*.sqlite") if file.stem == file.parent.name)
    if not files:
        raise UserError(
            f"--db {path}: a folder without <db_id>/<db_id>.sqlite in it; {_EXPECTED}", code="init.no_database"
        )
    schemas = {file.stem: ENGINE.schema(file) for file in files}
    return Database(path, path.name, schemas, "sqlite", is_folder=True)


def _schema(path: Path, wanted: str | None) -> Database:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--db {path}: not readable as a schema ({why}); {_EXPECTED}", code="init.unreadable_database"
        ) from None
    guessed = next((dialect for start, dialect in DUMPS.items() if start in text[:2000]), None) or next(
        (dialect for dialect, sign in _SIGNS.items() if re.search(sign, text, re.IGNORECASE | re.MULTILINE)), "sqlite"
    )
    expected = dialect_name(wanted) if wanted else guessed
    try:
        schema, dialect = readable_schema(text, expected)
    except UserError as error:
        raise UserError(f"--db {path}: {error}; {_EXPECTED}", code="init.bad_schema") from None
    if wanted and dialect != expected:
        raise UserError(
            f"--db {path}: does not read as {expected}, but as {dialect}: {shown(schema[:60])}",
            code="init.bad_schema",
        )
    name = database_name(path)
    return Database(path, name, {name: schema}, dialect, unshown=tuple(types_not_shown(text, dialect)))
