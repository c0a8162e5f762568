"""The columns of a query: what CREATE VIEW, CREATE TABLE AS and SELECT INTO give their table."""

from collections.abc import Callable

from sqlglot import exp
from sqlglot.dialects import Postgres
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ParseError, SqlglotError
from sqlglot.optimizer.qualify_columns import qualify_columns
from sqlglot.optimizer.qualify_tables import qualify_tables
from sqlglot.schema import MappingSchema

from finetune.sql.ddl.names import column_name
from finetune.sql.tables import Column, Table


def query_columns(
    query: exp.Query | exp.Values, find: Callable[[exp.Table], Table | None], dialect: Dialect
) -> list[Column]:
    """The columns of a query's result. find: the table that a name means, or None.

    Raises ParseError if `*` stands for the columns of a table that is not known.
    """
    if isinstance(query, exp.Values):
        width = len(query.expressions[0].expressions)
        return [Column(f"column{number}", "", False, True) for number in range(1, width + 1)]
    first = _first_select(query)
    if any(_is_star(projection) for projection in first.expressions):
        first = _first_select(_expanded(query, find, dialect))
    return [_column(projection, dialect) for projection in first.expressions]


def _first_select(query: exp.Expr) -> exp.Select:
    """The SELECT that names the columns: the first one of a UNION."""
    while isinstance(query, exp.SetOperation | exp.Subquery):
        query = query.this
    if not isinstance(query, exp.Select):
        raise ParseError("the columns of its query cannot be read")
    return query


def _is_star(projection: exp.Expr) -> bool:
    return bool(projection.is_star)


def _expanded(query: exp.Query, find: Callable[[exp.Table], Table | None], dialect: Dialect) -> exp.Expr:
    """The query with the columns that each `*` stands for."""
    query = query.copy()
    columns: dict[str, dict[str, str]] = {}
    own = {cte.alias.lower() for cte in query.find_all(exp.CTE)}
    for table in list(query.find_all(exp.Table)):
        known = None if not table.db and table.name.lower() in own else find(table)
        if known is None:
            continue
        stand_in = f"table_{len(columns)}"  # a flat name, because a schema of sqlglot has one depth
        columns[stand_in] = {column.name: "text" for column in known.columns}
        table.replace(exp.alias_(exp.to_table(stand_in), table.alias_or_name, table=True))
    try:
        qualify_tables(query, dialect=dialect)
        query = qualify_columns(
            query,
            MappingSchema(columns, dialect=dialect, normalize=False),
            expand_stars=True,
            expand_alias_refs=False,
            allow_partial_qualification=True,
        )
    except SqlglotError as error:
        raise ParseError(f"its columns cannot be known ({' '.join(str(error).split())})") from None
    if any(_is_star(projection) for projection in _first_select(query).expressions):
        raise ParseError("its columns cannot be known: * takes those of a table that no statement before it creates")
    return query


def _column(projection: exp.Expr, dialect: Dialect) -> Column:
    identifier = projection.args.get("alias") or projection
    if isinstance(projection, exp.Column | exp.Dot):
        identifier = projection.parts[-1]
    if isinstance(identifier, exp.Identifier):
        return Column(identifier.name, "", False, True, column_name(identifier, dialect))
    name = projection.alias or _unnamed(projection, dialect)
    written = column_name(exp.to_identifier(name, quoted=True), dialect)
    return Column(name, "", False, True, written, is_guess=not projection.alias)


def _unnamed(projection: exp.Expr, dialect: Dialect) -> str:
    """The name that a database gives an expression without alias: its text, in PostgreSQL the function's name."""
    if not isinstance(dialect, Postgres):
        return str(projection.sql(dialect))
    return projection.sql_name().lower() if isinstance(projection, exp.Func) else "?column?"
