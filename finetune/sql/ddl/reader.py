"""Reads DDL of any dialect into tables and keys, using sqlglot.

Every statement is applied, known to be irrelevant (`script.Statement.role`), or an error that quotes it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ParseError

from finetune.errors import UserError
from finetune.sql.ddl.alter import altered, has_no_effect, renamed_table
from finetune.sql.ddl.items import (
    CONSTRAINTS,
    column_of,
    foreign_keys_of,
    is_index,
    named_column,
    with_primary_key,
    without_repeats,
)
from finetune.sql.ddl.names import path_of, table_name
from finetune.sql.ddl.queries import query_columns
from finetune.sql.ddl.repair import readable_alter, readable_create
from finetune.sql.ddl.script import Statement, split_script, virtual_table
from finetune.sql.ddl.types import Types
from finetune.sql.dialects import dialect_name
from finetune.sql.parsing import parse_statements
from finetune.sql.tables import Column, Table, table_at
from finetune.sql.text import shortened

_FAULTS_OF_PARSER = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""What sqlglot raises instead of a ParseError for some odd texts."""


def tables_by_sqlglot(ddl: str, dialect: str) -> list[Table]:
    """The tables and views that exist after the script, in the order of their creation.

    Raises a UserError that quotes the statement that cannot be read, and for an unknown dialect.
    """
    dialect = dialect_name(dialect)
    reader = _Reader(dialect)
    text = ddl
    try:
        for statement in split_script(ddl, reader.dialect):
            text = statement.text
            reader.apply(statement)
    except (ParseError, *_FAULTS_OF_PARSER) as error:
        problem = error if isinstance(error, ParseError) else "it cannot be read"
        where = " ".join(shortened(text, dialect=dialect).split())  # where a quote is not closed, it keeps its lines
        raise UserError(f"schema: {problem}, in: {where}", code="sql.bad_schema") from None
    return [reader.types.applied(table) for table in reader.tables]


class _Reader:
    """The tables after the statements applied so far. Its methods raise ParseError for what cannot be read."""

    def __init__(self, dialect: str) -> None:
        self.name, self.dialect = dialect, Dialect.get_or_raise(dialect)
        self.tables: list[Table] = []
        self.types = Types(self.dialect)

    def apply(self, statement: Statement) -> None:
        match statement.role:
            case "create":
                self._create(statement.text)
            case "type":
                self.types.apply(statement.text)
            case "hidden":
                self._create_hidden(statement)
            case "virtual":
                name, columns = virtual_table(statement.text, self.dialect)
                self._add(Table(name, tuple(Column(column, "", False, True) for column in columns)))
            case "alter":
                self._alter(statement)
            case "drop":
                self._drop(statement.text)
            case "unknown":
                raise ParseError("not a statement that is known")

    def _create_hidden(self, statement: Statement) -> None:
        for text in statement.inner:
            try:
                self._create(text)
            except ParseError:
                raise ParseError("it creates a table inside a block or a text, where it cannot be read") from None

    def _find(self, table: exp.Expr) -> Table | None:
        return table_at(self.tables, path_of(table)) if isinstance(table, exp.Table) and path_of(table) else None

    def _parse(self, text: str) -> exp.Expr | None:
        trees = parse_statements(text, self.name)
        if len(trees) != 1:
            raise ParseError(f"there are {len(trees)} statements where one should be")
        return trees[0]

    def _read(self, text: str, readable: Callable[[str, Dialect], str | None]) -> exp.Expr | None:
        """The tree of a statement, if need be without the options that sqlglot does not read."""
        problem = ParseError("it cannot be read")
        try:
            tree = self._parse(text)
        except ParseError as error:
            tree, problem = None, error
        if tree is not None and not isinstance(tree, exp.Command):
            return tree
        rewritten = readable(text, self.dialect)
        try:
            tree = self._parse(rewritten) if rewritten else None
        except ParseError:
            tree = None
        if tree is None or isinstance(tree, exp.Command):
            raise problem
        return tree

    # CREATE -------------------------------------------------------------------------------------------------

    def _create(self, text: str) -> None:
        tree = self._read(text, partial(readable_create, types=self.types.names))
        if isinstance(tree, exp.Select) and (into := tree.args.get("into")):
            if isinstance(into.this, exp.Table) and path_of(into.this):  # not a variable
                self._add(self._table(into.this, query_columns(tree, self._find, self.dialect)))
            return
        if not isinstance(tree, exp.Create):  # WITH ... INSERT
            return
        schema = tree.this if isinstance(tree.this, exp.Schema) else None
        target = schema.this if schema else tree.this
        if not isinstance(target, exp.Table) or not path_of(target):
            raise ParseError("its name cannot be read")
        table = replace(self._table(target, self._columns(tree, schema)), is_view=tree.kind == "VIEW")
        if not table.columns and schema is None:
            raise ParseError("its columns cannot be read")
        if schema is not None:
            table = replace(
                with_primary_key(table, schema.expressions), foreign_keys=foreign_keys_of(schema.expressions)
            )
        self._add(table, replaces=bool(tree.args.get("replace")), if_absent=bool(tree.args.get("exists")))

    def _table(self, target: exp.Table, columns: list[Column]) -> Table:
        name, qualifier, written = table_name(target, self.dialect)
        return Table(name, tuple(columns), (), qualifier, written)

    def _add(self, table: Table, *, replaces: bool = False, if_absent: bool = False) -> None:
        same = next((number for number, other in enumerate(self.tables) if other.path == table.path), None)
        if same is None or not (replaces or if_absent):
            self.tables.append(table)
        elif replaces:
            self.tables[same] = table

    def _columns(self, tree: exp.Create, schema: exp.Schema | None) -> list[Column]:
        """The columns of CREATE TABLE or CREATE VIEW, wherever they come from."""
        own: list[Column] = []
        for item in schema.expressions if schema else []:
            if isinstance(item, exp.ColumnDef):
                if not is_index(item, self.dialect):
                    own.append(column_of(item, self.dialect))
            elif isinstance(item, exp.Identifier):
                own.append(named_column(item, self.dialect))
            elif isinstance(item, exp.LikeProperty):
                own += self._columns_of(item.this)
            elif not isinstance(item, CONSTRAINTS):
                raise ParseError(f"not a column or constraint that is known: {item.sql(self.dialect)[:60]}")
        if isinstance(tree.expression, exp.Query | exp.Values) and (not own or self.name == "mysql"):
            own += query_columns(tree.expression, self._find, self.dialect)
        copied = [column for source in _copied(tree) for column in self._columns_of(source)]
        partitions = [
            column_of(item, self.dialect)  # Hive declares columns there
            for part in tree.find_all(exp.PartitionedByProperty)
            for item in part.this.expressions
            if isinstance(item, exp.ColumnDef)
        ]
        return without_repeats([*copied, *own, *partitions])

    def _columns_of(self, source: exp.Expr) -> tuple[Column, ...]:
        table = self._find(source)
        if table is None:
            name = source.sql(self.dialect)
            raise ParseError(f"it takes its columns from {name}, which no statement before it creates")
        return table.columns

    # ALTER and DROP -----------------------------------------------------------------------------------------

    def _alter(self, statement: Statement) -> None:
        try:
            tree = self._read(statement.text, readable_alter)
        except ParseError:
            if has_no_effect(statement.words):
                return
            raise
        if not isinstance(tree, exp.Alter):
            raise ParseError("it cannot be read")
        table = self._find(tree.this)
        if table is None:  # the schema does not show that table, with or without the change
            return
        number = self.tables.index(table)
        for action in tree.args.get("actions") or []:
            if isinstance(action, exp.AlterRename):
                self._rename(number, action.this)
            else:
                self.tables[number] = altered(self.tables[number], action, self.dialect)

    def _rename(self, number: int, new: exp.Table) -> None:
        old, renamed = self.tables[number], renamed_table(self.tables[number], new, self.dialect)
        self.tables[number] = renamed
        for other, table in enumerate(self.tables):
            keys = tuple(
                replace(key, table=renamed.name, qualifier=renamed.qualifier) if key.path == old.path else key
                for key in table.foreign_keys
            )
            self.tables[other] = replace(table, foreign_keys=keys)

    def _drop(self, text: str) -> None:
        tree = self._parse(text)
        if not isinstance(tree, exp.Drop):
            raise ParseError("it cannot be read")
        for target in tree.args.get("tables") or [tree.this]:
            table = self._find(target)
            if table is not None:
                self.tables.remove(table)


def _copied(tree: exp.Create) -> Iterator[exp.Expr]:
    """The tables whose columns a new table takes over: INHERITS, PARTITION OF, LIKE, CLONE, COPY."""
    properties = tree.args.get("properties")
    for item in properties.expressions if properties else []:
        if isinstance(item, exp.InheritsProperty):
            yield from item.expressions
        elif isinstance(item, exp.LikeProperty | exp.PartitionedOfProperty):
            yield item.this.this if isinstance(item.this, exp.Schema) else item.this
    if isinstance(tree.expression, exp.Table) and isinstance(tree.this, exp.Table):  # ClickHouse: CREATE TABLE a AS b
        yield tree.expression
    if tree.args.get("clone"):
        yield tree.args["clone"].this
