"""The tables, columns and keys that DDL declares."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    primary_key: bool
    nullable: bool
    """False for NOT NULL and for a primary key (although SQLite, because of an old bug, allows NULL there)."""
    written: str | None = None
    """The name as a query has to write it, if that is not as `schema.quoted` writes it."""
    fields: tuple[str, ...] = ()
    """The fields of a STRUCT, as a query writes them: ``customer.city``; of an ARRAY of STRUCT: ``items[].sku``."""
    is_guess: bool = False
    """Whether the name is our guess of what a database calls an expression without an alias, in a view or CREATE TABLE AS."""
    values: tuple[str, ...] = ()
    """Those of an enum, as CREATE TYPE lists them, if its type is one."""
    is_array: bool = False
    """Whether it holds an array of these values."""


@dataclass(frozen=True)
class ForeignKey:
    columns: tuple[str, ...]
    table: str
    referenced: tuple[str, ...]
    """As many as `columns`; empty if the DDL names none and the other table has no primary key of as many columns."""
    qualifier: tuple[str, ...] = ()
    """The schema of the other table, and what else is written before its name."""

    @property
    def path(self) -> tuple[str, ...]:
        """Qualifier and table in lower case."""
        return tuple(part.lower() for part in (*self.qualifier, self.table))


@dataclass(frozen=True)
class Table:
    """A table or a view."""

    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()
    qualifier: tuple[str, ...] = ()
    """What the DDL writes before the name: its schema, dataset, project or database."""
    written: str | None = None
    """Qualifier and name as a query has to write them, if that is not as `schema.quoted` writes them."""
    is_view: bool = False

    @property
    def has_unnamed_columns(self) -> bool:
        return any(column.is_guess for column in self.columns)

    @property
    def primary_key(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.primary_key)

    @property
    def path(self) -> tuple[str, ...]:
        """Qualifier and name in lower case, to find the table by."""
        return tuple(part.lower() for part in (*self.qualifier, self.name))


def table_at(tables: Iterable[Table], path: tuple[str, ...], near: tuple[str, ...] = ()) -> Table | None:
    """The table that a query means by a path in lower case: the one that has it, else the only one whose path ends in it
    or in which it ends. near: a qualifier in lower case that is tried first for a name without one."""
    tables = list(tables)
    exact = {table.path: table for table in tables}
    for candidate in ((*near, path[-1]) if len(path) == 1 else path, path):
        if candidate in exact:
            return exact[candidate]
    alike = [table for table in tables if ends_alike(table.path, path)]
    return alike[0] if len(alike) == 1 else None


def ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two paths can mean the same table: the shorter one is the end of the other."""
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]
