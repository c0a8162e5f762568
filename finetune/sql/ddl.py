"""Reads CREATE TABLE statements of any dialect into tables and keys, using sqlglot."""

from collections.abc import Iterable

from sqlglot import exp
from sqlglot.errors import ParseError

from finetune.errors import UserError
from finetune.sql.parsing import parse_statements
from finetune.sql.tables import Column, ForeignKey, Table
from finetune.sql.text import shortened


def tables_by_sqlglot(creating: Iterable[str], dialect: str) -> list[Table]:
    """One table per statement. Raises a UserError that quotes the statement that cannot be read."""
    tables = []
    for statement in creating:
        try:
            tree = parse_statements(statement, dialect)[0]
            if not isinstance(tree, exp.Create) or not isinstance(tree.this, exp.Schema):
                raise ParseError("its columns cannot be read")
        except ParseError as error:
            raise UserError(
                f"schema: {error}, in: {shortened(statement, dialect=dialect)}", code="sql.bad_schema"
            ) from None
        tables.append(_table(tree.this))
    return tables


def _table(schema: exp.Schema) -> Table:
    primary = {name.lower() for key in schema.find_all(exp.PrimaryKey) for name in _names(key.expressions)}
    columns: list[Column] = []
    foreign_keys: list[ForeignKey] = []
    for item in schema.expressions:
        if isinstance(item, exp.ColumnDef):
            columns.append(_column(item, is_key=item.name.lower() in primary))
            references = [part.kind for part in item.constraints if isinstance(part.kind, exp.Reference)]
            foreign_keys += [ForeignKey((item.name,), *_target(reference)) for reference in references]
        else:
            keys = item.find_all(exp.ForeignKey)
            foreign_keys += [ForeignKey(_names(key.expressions), *_target(key.args["reference"])) for key in keys]
    return Table(schema.this.name, tuple(columns), tuple(foreign_keys))


def _column(definition: exp.ColumnDef, is_key: bool) -> Column:
    constraints = [part.kind for part in definition.constraints]
    is_key = is_key or any(isinstance(part, exp.PrimaryKeyColumnConstraint) for part in constraints)
    not_null = any(
        isinstance(part, exp.NotNullColumnConstraint) and not part.args.get("allow_null") for part in constraints
    )
    kind = definition.args.get("kind")
    return Column(definition.name, kind.sql() if kind else "", is_key, nullable=not (is_key or not_null))


def _target(reference: exp.Expr) -> tuple[str, tuple[str, ...]]:
    """The table that a REFERENCES clause names, and its columns."""
    target = reference.this
    if isinstance(target, exp.Schema):
        return target.this.name, _names(target.expressions)
    return target.name, ()


def _names(parts: Iterable[exp.Expr]) -> tuple[str, ...]:
    return tuple(identifier.name for part in parts if (identifier := part.find(exp.Identifier)))
