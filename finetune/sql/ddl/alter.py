"""Applies ALTER TABLE to a table: dumps put keys there, migrations also columns."""

from dataclasses import replace

from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ParseError

from finetune.sql.ddl.items import column_of, foreign_keys_of, with_primary_key, without_repeats
from finetune.sql.ddl.names import column_name, table_name
from finetune.sql.quoting import word_set
from finetune.sql.tables import Column, ForeignKey, Table

_WITHOUT_EFFECT = (
    exp.AddPartition,
    exp.AlterColumn,
    exp.AlterDistStyle,
    exp.AlterSet,
    exp.AlterSortKey,
    exp.DropPartition,
)
"""Parts of ALTER TABLE that change no name and no key."""
_UNREAD_WITHOUT_EFFECT = word_set(
    """
    ALTER ATTACH AUTO_INCREMENT CHECK CLUSTER COMMENT CONVERT DEFAULT DETACH DISABLE ENABLE ENGINE FORCE INHERIT MODIFY
    NOCHECK NO ORDER OWNER REBUILD REPLICA RESET SET SWITCH VALIDATE
"""
)
"""First words of such parts that sqlglot does not read."""
_KEPT = word_set("CHECK CONSTRAINT DEFAULT EXCLUDE FULLTEXT INDEX KEY PARTITION SPATIAL UNIQUE")
"""Words behind ADD and DROP, where neither concerns a column or key."""


def altered(table: Table, action: exp.Expr, dialect: Dialect) -> Table:
    """The table after one part of ALTER TABLE other than RENAME TO. Raises ParseError for one that is not known."""
    if isinstance(action, exp.AddConstraint):
        keys = foreign_keys_of(action.expressions)
        return with_primary_key(replace(table, foreign_keys=(*table.foreign_keys, *keys)), action.expressions)
    if isinstance(action, exp.Schema):  # ADD (a int, b int)
        for part in action.expressions:
            table = altered(table, part, dialect)
        return table
    if isinstance(action, exp.ColumnDef):
        columns = tuple(without_repeats([*table.columns, column_of(action, dialect)]))
        return replace(table, columns=columns, foreign_keys=(*table.foreign_keys, *foreign_keys_of([action])))
    if isinstance(action, exp.Drop):
        return _without(table, action)
    if isinstance(action, exp.RenameColumn):
        return _renamed(table, action.this.name, action.args["to"].find(exp.Identifier), dialect)
    if isinstance(action, exp.ModifyColumn):
        old = action.args.get("rename_from")
        return _renamed(table, old.name, action.this.this, dialect) if old is not None else table
    if isinstance(action, _WITHOUT_EFFECT):
        return table
    raise ParseError(f"not a change that is known: {action.sql(dialect)[:60]}")


def _without(table: Table, action: exp.Drop) -> Table:
    if action.kind != "COLUMN":
        return table
    gone = {target.name.lower() for target in action.args.get("tables") or [action.this]}
    return replace(
        table,
        columns=tuple(column for column in table.columns if column.name.lower() not in gone),
        foreign_keys=tuple(key for key in table.foreign_keys if not gone & {name.lower() for name in key.columns}),
    )


def _renamed(table: Table, old: str, new: exp.Expr | None, dialect: Dialect) -> Table:
    if new is None:
        raise ParseError("the column's new name cannot be read")

    def change(column: Column) -> Column:
        if column.name.lower() != old.lower():
            return column
        return replace(column, name=new.name, written=column_name(new, dialect))

    def in_key(key: ForeignKey) -> ForeignKey:
        return replace(key, columns=tuple(new.name if name.lower() == old.lower() else name for name in key.columns))

    return replace(
        table, columns=tuple(map(change, table.columns)), foreign_keys=tuple(map(in_key, table.foreign_keys))
    )


def renamed_table(table: Table, new: exp.Table, dialect: Dialect) -> Table:
    """The table under its new name, in the schema where it was if the new name has none."""
    name, qualifier, written = table_name(new, dialect)
    if not qualifier and table.qualifier:
        prefix = (table.written or ".".join((*table.qualifier, table.name))).rpartition(".")[0]
        qualifier, written = table.qualifier, f"{prefix}.{written or name}"
    return replace(table, name=name, qualifier=qualifier, written=written)


def has_no_effect(words: tuple[str, ...]) -> bool:
    """Whether an ALTER TABLE that cannot be read changes no name and no key. words: as in `script.Statement.words`."""
    start = 2
    while words[start : start + 1] and words[start] in ("ONLY", "IF", "EXISTS"):
        start += 1
    start += 1
    while words[start : start + 1] == ("",):  # a dot and another part of the name
        start += 2
    first, rest = words[start : start + 1], words[start + 1 :]
    if not {"ADD", "DROP"}.isdisjoint(first):
        changes = {"COLUMN", "FOREIGN", "PRIMARY", "REFERENCES"} & set(rest)
        return not changes and not _KEPT.isdisjoint(rest[:1])
    return (
        not _UNREAD_WITHOUT_EFFECT.isdisjoint(first)
        and first + rest[:1] != ("SET", "SCHEMA")
        and (first == ("ALTER",) or not {"ADD", "DROP", "RENAME"} & set(rest))
    )
