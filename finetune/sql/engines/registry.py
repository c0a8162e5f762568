"""The SQL engines by dialect. A new one is a module here and an entry in ENGINES: docs/extending.md."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finetune.sql.engines.base import Engine, Session
from finetune.sql.engines.sqlite import SqliteEngine

DEFAULT = "sqlite"
ENGINES: dict[str, Engine] = {DEFAULT: SqliteEngine()}


def engine_for(dialect: str) -> Engine | None:
    """The engine that runs a dialect; None where there is none, and SQL of that dialect is parsed and never run."""
    return ENGINES.get(dialect)


def engine_of_file(database: Path) -> Engine:
    """The engine whose databases have this file's suffix, by default SQLite: its files have all kinds of names."""
    by_suffix = {engine.suffix: engine for engine in ENGINES.values()}
    return by_suffix.get(database.suffix.lower(), ENGINES[DEFAULT])


@contextmanager
def open_sessions() -> Iterator[Callable[[str], Session]]:
    """A function from a dialect that has an engine to its session: each is opened when it is first asked for, and all are
    closed at the end of the `with` statement."""
    with ExitStack() as stack:

        @functools.cache
        def session(dialect: str) -> Session:
            return stack.enter_context(ENGINES[dialect].open())

        yield session
