"""Compares the columns that a query reads with those that its schema shows, and names only those that it certainly lacks.

Where a query is read without a database, much is uncertain: a function returns columns that no text names, a word may stand for
a part of a date. So a name counts as missing only if nothing in the schema and nothing else in the query has it.
"""

import re
from collections.abc import Iterator

from sqlglot import exp
from sqlglot.errors import ParseError

from finetune.sql.ddl.names import path_of
from finetune.sql.parsing import shared_tree
from finetune.sql.quoting import word_set
from finetune.sql.schema import shared_tables
from finetune.sql.tables import Table, ends_alike

_VALUES = word_set(
    """
    current_catalog current_date current_role current_schema current_time current_timestamp current_user false localtime
    localtimestamp null session_user system_user true unknown user
    """
)
"""Words without parentheses that are values, in any dialect."""
_WITHOUT_DECLARATION = {
    "sqlite": "rowid oid _rowid_",
    "postgres": "ctid cmin cmax xmin xmax oid tableoid count row_to_json to_json to_jsonb",  # t.count is count(t)
    "redshift": "oid sysdate count",
    "mysql": "my_row_id utc_date utc_time utc_timestamp",
    "oracle": "rowid rownum level ora_rowscn column_value object_value nextval currval connect_by_isleaf connect_by_iscycle "
    "uid sysdate systimestamp dbtimezone sessiontimezone",
    "tsql": "identitycol rowguidcol",
    "duckdb": "rowid filename file_row_number",
    "hive": "input__file__name block__offset__inside__file",
    "teradata": "date time",
}
"""Columns and values that nobody declares, by dialect; what begins with _ or holds a $ is never judged (see `_is_plain`)."""
_KEYWORDS_OF_FUNCTIONS = word_set(
    """
    century d date datetime day dayofmonth dayofweek dayofyear days dd decade dow doy dw dy epoch h hh hour hours isodow isowk
    isoweek isoyear m mcs mi microsecond microseconds millennium millisecond milliseconds min minute minutes mm mon month months
    ms n nanosecond ns q qq qtr quarter quarters s sec second seconds ss time timestamp us w week weekday weeks wk ww y year
    years yy yyyy
    """
)
"""Arguments that are no columns, as in DATE_BUCKET(week, 1, x), of functions that sqlglot does not know."""
_WITHOUT_ALIAS = re.compile(
    r"_?(?:col|column|c|f)_?\d+_?|(?:big|small)?int\d*|bool|numeric|float\d*|text|varchar|interval|date|time|timestamp(?:tz)?"
    r"|array|case|coalesce|date_part|exists|extract|grouping|row|[blr]trim|timezone|bpchar|bytea|jsonb?|uuid|xml"
)
"""How databases call an expression without an alias; PostgreSQL calls a constant by its type."""
_WITHOUT_STRUCTS = word_set("postgres mysql sqlite tsql redshift")
"""Dialects in which `a.b` is never the field b of a column a."""
_QUOTES_MAY_BE_TEXT = word_set("sqlite tsql")
_UNCERTAIN = (exp.Lateral, exp.MatchRecognize, exp.Partition, exp.Pivot, exp.TableFromRows, exp.Unnest)
"""Parts of a query whose names come from elsewhere than from tables."""
_CHANGES_CHILDREN = re.compile(
    r"\b(?:INHERITS|PARTITION\s+OF)\b.*\b(?:ADD\s+COLUMN|RENAME)\b", re.IGNORECASE | re.DOTALL
)
_VIRTUAL = re.compile(r"\bVIRTUAL\s+TABLE\b", re.IGNORECASE)


def columns_not_shown(sql: str, schema: str, dialect: str) -> list[str]:
    """The columns that a query reads and that its schema certainly lacks, as the query writes them, sorted.

    These are: a name without a table that no table of the schema and nothing in the query has (alias, WITH, row of a table); and
    a name with a table that is one table of the schema without such a column. Letters of either case are the same. Not judged:
    what comes from subqueries, functions, catalogs, files and pivots, fields of a STRUCT, SQLite's virtual tables, and views with
    columns that their text does not name. Empty if the query cannot be parsed. Raises UserError if the schema cannot.
    """
    try:
        tree = shared_tree(sql, dialect)
    except ParseError:
        return []
    if _VIRTUAL.search(schema):
        return []
    query = _Query(tree, sql, schema, dialect)
    return sorted({column.sql(dialect) for column in tree.find_all(exp.Column) if query.lacks(column)})


class _Query:
    """What the names in one query can stand for."""

    def __init__(self, tree: exp.Expr, sql: str, schema: str, dialect: str) -> None:
        self._sql, self._dialect = sql, dialect
        self._tables = shared_tables(schema, dialect)
        self._changes_children = bool(_CHANGES_CHILDREN.search(schema))
        self._known = {name for table in self._tables for name in _names(table)}
        self._undeclared = _VALUES | word_set(_WITHOUT_DECLARATION.get(dialect, ""))
        self._functions = {word.lower() for word in re.findall(r"(\w+)\s*\(", sql)}
        self._with = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
        self._sources = list(tree.find_all(exp.Table))
        self._parents: dict[str, list[exp.Expr | None]] = {}
        """Of each name that is no column: what it is part of."""
        for identifier in tree.find_all(exp.Identifier):
            if not isinstance(identifier.parent, exp.Column):
                self._parents.setdefault(identifier.name.lower(), []).append(identifier.parent)
        self._knows_all_sources = (
            all(self._is_known(source) for source in self._sources)
            and not tree.find(*_UNCERTAIN)
            and not any(select.args.get("settings") for select in tree.find_all(exp.Select))
        )

    def lacks(self, column: exp.Column) -> bool:
        """Whether the schema certainly has no such column."""
        name = column.name.lower()
        if name in self._undeclared or len(column.parts) > 2 or not self._is_plain(column):
            return False
        if column.table:
            table = self._table_called(column.table.lower())
            return table is not None and name not in _names(table)
        return (
            self._knows_all_sources
            and name not in self._known
            and not self._is_named(column)
            and not self._is_word(column)
        )

    def _meant(self, source: exp.Table) -> list[Table]:
        """The tables of the schema that a source can be; several where they differ in what stands before the name."""
        path = path_of(source)
        if not path or (len(path) == 1 and path[0] in self._with):
            return []
        return [table for table in self._tables if ends_alike(path, table.path)]

    def _is_known(self, source: exp.Table) -> bool:
        """Whether the schema or the query itself has the names of all columns of a source."""
        if len(path := path_of(source)) == 1 and path[0] in self._with:
            return True
        meant = self._meant(source)
        return bool(meant) and not any(table.has_unnamed_columns for table in meant)

    def _is_plain(self, column: exp.Column) -> bool:
        """Whether it is written like a column's name, not like a text, a pseudo-column ($path, _PARTITIONTIME) or an expression,
        which some databases take as its column's name."""
        if not isinstance(column.this, exp.Identifier):
            return False
        if self._dialect in _QUOTES_MAY_BE_TEXT and f'"{column.name}"' in self._sql:
            return False
        if self._dialect == "postgres":
            return bool(column.name != "?column?")
        return re.fullmatch(r"[^\W\d_]\w*", column.name) is not None

    def _table_called(self, name: str) -> Table | None:
        """The table of the schema that a name stands for wherever the query uses it; None if that is not certain."""
        if self._changes_children or (self._dialect not in _WITHOUT_STRUCTS and name in self._known):
            return None
        called = [source for source in self._sources if source.alias_or_name.lower() == name]
        for parent in self._parents.get(name, ()):
            owner = parent.parent if isinstance(parent, exp.TableAlias) else parent
            if not isinstance(owner, exp.Table | exp.Alias):  # a subquery, a function, WITH
                return None
        meant = {tuple(self._meant(source)) for source in called}
        tables = meant.pop() if len(meant) == 1 else ()
        if len(tables) != 1 or tables[0].has_unnamed_columns or not all(map(_has_own_names, called)):
            return None
        return tables[0]

    def _is_named(self, column: exp.Column) -> bool:
        """Whether something in the query has the name, other than the alias of an expression that the column is part of."""
        around = {id(node) for node in _ancestors(column) if isinstance(node, exp.Alias)}
        return any(id(parent) not in around for parent in self._parents.get(column.name.lower(), ()))

    def _is_word(self, column: exp.Column) -> bool:
        """Whether it may be the name of an expression without an alias, or a keyword."""
        name = column.name.lower()
        if name in self._functions or _WITHOUT_ALIAS.fullmatch(name):
            return True
        return isinstance(column.parent, exp.Anonymous) and name in _KEYWORDS_OF_FUNCTIONS


def _has_own_names(source: exp.Table) -> bool:
    """Whether the columns of a source keep their names: no pivot, no list of names behind its alias."""
    alias = source.args.get("alias")
    return not (source.args.get("pivots") or (alias is not None and alias.args.get("columns")))


def _names(table: Table) -> set[str]:
    return {column.name.lower() for column in table.columns}


def _ancestors(node: exp.Expr) -> Iterator[exp.Expr]:
    parent = node.parent
    while parent is not None:
        yield parent
        parent = parent.parent
