"""Names in sqlglot's trees: as text, and as a query of the dialect has to write them."""

from collections.abc import Iterator

from sqlglot import exp
from sqlglot.dialects import SQLite
from sqlglot.dialects.dialect import Dialect, NormalizationStrategy

from finetune.sql.quoting import quoted


def path_of(table: exp.Table) -> tuple[str, ...]:
    """Qualifier and name in lower case; () if the table has no plain name, as the result of a function."""
    parts = table.parts
    if not all(isinstance(part, exp.Identifier) for part in parts):
        return ()
    return tuple(plain_name(part).lower() for part in parts)


def table_name(table: exp.Table, dialect: Dialect) -> tuple[str, tuple[str, ...], str | None]:
    """Name, qualifier, and both as a query writes them (None: as `quoting.quoted` writes the name)."""
    *qualifier, name = [plain_name(part) for part in table.parts]
    if not qualifier:
        return name, (), column_name(table.this, dialect)
    return name, tuple(qualifier), ".".join(_written(part, dialect) for part in table.parts)


def column_name(identifier: exp.Expr, dialect: Dialect) -> str | None:
    """A name as a query writes it; None: as `quoting.quoted` does."""
    written, name = _written(identifier, dialect), plain_name(identifier)
    return None if written == quoted(name) or isinstance(dialect, SQLite) else written


def plain_name(identifier: exp.Expr) -> str:
    """The name without quotes; the `#` of T-SQL's temporary tables is part of it."""
    prefix = "##" if identifier.args.get("global_") else "#" if identifier.args.get("temporary") else ""
    return f"{prefix}{identifier.name}"


def fields_of(column: exp.ColumnDef, dialect: Dialect) -> Iterator[str]:
    """The fields of a STRUCT, to any depth, as a query writes them; [] marks an array on the way to them."""
    kind = column.args.get("kind")
    if isinstance(kind, exp.DataType):
        yield from _fields(kind, _written(column.this, dialect), dialect)


def _fields(kind: exp.DataType, path: str, dialect: Dialect) -> Iterator[str]:
    for part in kind.expressions:
        if isinstance(part, exp.ColumnDef):
            inner = f"{path}.{_written(part.this, dialect)}"
            deeper = part.args.get("kind")
            found = list(_fields(deeper, inner, dialect)) if isinstance(deeper, exp.DataType) else []
            yield from found or [inner]
        elif isinstance(part, exp.DataType):
            yield from _fields(part, f"{path}[]", dialect)


def _written(identifier: exp.Expr, dialect: Dialect) -> str:
    """A name that the DDL writes without quotes needs none. Quotes are kept for odd names, for keywords, and where an
    unquoted name would be folded to other letters (PostgreSQL, Oracle, Snowflake)."""
    name = plain_name(identifier)
    if not identifier.args.get("quoted"):
        return name
    folds = {NormalizationStrategy.LOWERCASE: str.lower, NormalizationStrategy.UPPERCASE: str.upper}
    fold = folds.get(dialect.normalization_strategy)
    keyword = name.upper() in dialect.tokenizer_class.KEYWORDS
    if quoted(name) != name or keyword or (fold is not None and fold(name) != name):
        return str(exp.to_identifier(name, quoted=True).sql(dialect))
    return name
