"""A database as its DDL declares it: tables with their columns and keys."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    primary_key: bool
    nullable: bool
    """False for NOT NULL and for a primary key (in which SQLite, by an old mistake, allows NULL)."""


@dataclass(frozen=True)
class ForeignKey:
    columns: tuple[str, ...]
    table: str
    referenced: tuple[str, ...]
    """As many as `columns`; empty when the DDL names none and the other table has no such primary key."""


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()

    @property
    def primary_key(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.primary_key)
