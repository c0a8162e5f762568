"""The tables, columns and keys that DDL declares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    primary_key: bool
    nullable: bool
    """False for NOT NULL and for a primary key (although SQLite, because of an old bug, allows NULL there)."""


@dataclass(frozen=True)
class ForeignKey:
    columns: tuple[str, ...]
    table: str
    referenced: tuple[str, ...]
    """As many as `columns`; empty if the DDL names none and the other table has no primary key of as many columns."""


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()

    @property
    def primary_key(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.primary_key)
