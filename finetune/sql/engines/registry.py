"""The SQL engines by dialect. To add one, write a module here and add it to ENGINES: docs/extending.md."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finetune.sql.engines.base import Engine, Limits, Session
from finetune.sql.engines.sqlite import SqliteEngine

DEFAULT = "sqlite"
ENGINES: dict[str, Engine] = {DEFAULT: SqliteEngine()}


def engine_for(dialect: str) -> Engine | None:
    """The engine that runs a dialect. None if there is none; SQL of that dialect is then only parsed, never run."""
    return ENGINES.get(dialect)


def engine_of_file(database: Path) -> Engine:
    """The engine whose databases have this file's suffix; SQLite for any other suffix, because its files use many."""
    by_suffix = {engine.suffix: engine for engine in ENGINES.values()}
    return by_suffix.get(database.suffix.lower(), ENGINES[DEFAULT])


@contextmanager
def open_sessions(limits: Limits | None = None) -> Iterator[Callable[[str], Session]]:
    """A function that returns the session of a dialect, which must have an engine. Each session is opened on first use, and
    all are closed at the end of the `with` statement. limits: of each query; None for the defaults."""
    with ExitStack() as stack:

        @functools.cache
        def session(dialect: str) -> Session:
            return stack.enter_context(ENGINES[dialect].open(limits or Limits()))

        yield session
