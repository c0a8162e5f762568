"""The items of a list of columns in sqlglot's trees: columns, keys and other constraints."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sqlglot import exp
from sqlglot.dialects import TSQL
from sqlglot.dialects.dialect import Dialect

from finetune.sql.ddl.names import column_name, fields_of, plain_name
from finetune.sql.tables import Column, ForeignKey, Table

CONSTRAINTS = (
    exp.CheckColumnConstraint,
    exp.Constraint,
    exp.ExcludeColumnConstraint,
    exp.ForeignKey,
    exp.IndexColumnConstraint,
    exp.PeriodForSystemTimeConstraint,
    exp.PrimaryKey,
    exp.ProjectionDef,
    exp.UniqueColumnConstraint,
)
"""What may stand in a list of columns without being a column."""


def column_of(definition: exp.ColumnDef, dialect: Dialect) -> Column:
    constraints = [part.kind for part in definition.constraints]
    is_key = any(isinstance(part, exp.PrimaryKeyColumnConstraint) for part in constraints)
    not_null = any(
        isinstance(part, exp.NotNullColumnConstraint) and not part.args.get("allow_null") for part in constraints
    )
    kind = definition.args.get("kind")
    return Column(
        definition.name,
        kind.sql() if kind else "",
        is_key,
        nullable=not (is_key or not_null),
        written=column_name(definition.this, dialect),
        fields=tuple(fields_of(definition, dialect)),
    )


def is_index(definition: exp.ColumnDef, dialect: Dialect) -> bool:
    """Whether it is an index, which sqlglot reads as a column: in T-SQL the bare word INDEX cannot be a column's name."""
    name = definition.this
    return isinstance(dialect, TSQL) and name.name.upper() == "INDEX" and not name.args.get("quoted")


def named_column(identifier: exp.Identifier, dialect: Dialect) -> Column:
    """A column without a type, as SQLite and the list of a view's columns have it."""
    return Column(identifier.name, "", False, True, column_name(identifier, dialect))


def foreign_keys_of(items: Iterable[exp.Expr]) -> tuple[ForeignKey, ...]:
    """The foreign keys of columns (REFERENCES) and of constraints (FOREIGN KEY), in their order."""
    found: list[ForeignKey] = []
    for item in items:
        if isinstance(item, exp.ColumnDef):
            references = [part.kind for part in item.constraints if isinstance(part.kind, exp.Reference)]
            found += [_foreign_key((item.name,), reference) for reference in references]
        else:
            keys = [key for key in item.find_all(exp.ForeignKey) if key.args.get("reference")]
            found += [_foreign_key(_names(key.expressions), key.args["reference"]) for key in keys]
    return tuple(found)


def _foreign_key(columns: tuple[str, ...], reference: exp.Expr) -> ForeignKey:
    target, referenced = reference.this, tuple[str, ...]()
    if isinstance(target, exp.Schema):
        target, referenced = target.this, _names(target.expressions)
    *qualifier, name = [plain_name(part) for part in target.parts]
    return ForeignKey(columns, name, referenced, tuple(qualifier))


def with_primary_key(table: Table, items: Iterable[exp.Expr]) -> Table:
    """The table with the primary key that its constraints name."""
    keys = {
        name.lower()
        for item in items
        if not isinstance(item, exp.ColumnDef)
        for key in item.find_all(exp.PrimaryKey)
        for name in _names(key.expressions)
    }
    columns = (
        replace(column, primary_key=True, nullable=False) if column.name.lower() in keys else column
        for column in table.columns
    )
    return replace(table, columns=tuple(columns))


def without_repeats(columns: Sequence[Column]) -> list[Column]:
    """The first of the columns of each name: a child may declare again what it inherits."""
    first: dict[str, Column] = {}
    for column in columns:
        first.setdefault(column.name.lower(), column)
    return list(first.values())


def _names(parts: Iterable[exp.Expr]) -> tuple[str, ...]:
    return tuple(identifier.name for part in parts if (identifier := part.find(exp.Identifier)))
