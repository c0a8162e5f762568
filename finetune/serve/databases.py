"""The databases that a server was started with, by name. A request names one; it never gives a path."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import UserError, shown
from finetune.evaluation.ask import is_schema, read_schema
from finetune.serve.api_errors import ApiError
from finetune.sql.engines.registry import DEFAULT, engine_of_file

_NAME = re.compile(r"[\w.-]{1,100}")
LONGEST_LIST = 20


@dataclass
class Database:
    """A database file, or a schema as .sql file. dialect: of its engine; None for a schema."""

    name: str
    path: Path
    wanted_dialect: str = DEFAULT
    _read: tuple[object, str, str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def dialect(self) -> str | None:
        return None if is_schema(self.path) else engine_of_file(self.path).dialect

    def schema(self) -> tuple[str, str]:
        """The schema as in prompts, and the dialect that reads it; read again when the file has changed. Raises UserError."""
        with self._lock:
            try:
                status = self.path.stat()
                state: object = status.st_mtime_ns, status.st_size, status.st_ino
            except OSError:
                state = None
            if self._read is None or state is None or self._read[0] != state:
                self._read = state, *read_schema(self.path, self.wanted_dialect)
            return self._read[1], self._read[2]


class Databases:
    def __init__(self, databases: Sequence[Database]) -> None:
        self._by_name = {database.name: database for database in databases}

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @property
    def all(self) -> list[Database]:
        return list(self._by_name.values())

    def named(self, name: str | None) -> Database:
        """The database of this name; for None the only one, if there is only one. Raises ApiError."""
        if name is None and len(self._by_name) == 1:
            return next(iter(self._by_name.values()))
        listed = ", ".join(self.names[:LONGEST_LIST]) + (", ..." if len(self.names) > LONGEST_LIST else "")
        known = f"this server has {listed}" if listed else "this server was started without any"
        if name is None:
            raise ApiError(
                400,
                "no schema: give `schema` (CREATE TABLE text), a system message that holds it, or `database`, the name of one; "
                f"{known}",
                code="missing_schema",
            )
        if name not in self._by_name:
            raise ApiError(
                400, f"no database is called {shown(name)}; {known}", code="unknown_database", param="database"
            )
        return self._by_name[name]


def databases_of(arguments: Sequence[str], dialect: str = DEFAULT) -> Databases:
    """From NAME=FILE, or FILE alone, which is named after the file. dialect: in which a .sql file is read first.

    Every schema is read once. Raises UserError for a name that is odd or there twice, and for a file that cannot be read.
    """
    found: dict[str, Database] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or Path(argument).exists():
            name, file = Path(argument).stem, argument
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--db {argument}: {shown(name)} cannot be the name of a database: letters, digits, _, . and - can; write "
                "NAME=FILE",
                code="serve.bad_database_name",
            )
        if name in found:
            raise UserError(
                f"--db {argument}: {name} is already the name of {found[name].path}; give another as NAME=FILE",
                code="serve.database_twice",
            )
        found[name] = Database(name, Path(file).expanduser(), dialect)
        found[name].schema()
    return Databases(list(found.values()))
