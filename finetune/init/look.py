"""What the user has given: looked at, before anything is asked or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.records import Record
from finetune.errors import UserError
from finetune.init.columns import map_columns
from finetune.init.config_text import Goal
from finetune.init.database import Database, look_at_database
from finetune.init.drafts import Drafts
from finetune.init.known_sets import KnownSet, set_in_folder, set_on_hub
from finetune.init.pairs import records_of
from finetune.init.rows import read_rows
from finetune.sql.tables import Table

DATABASES = "data/databases"
SHOWN = 5
"""Rows without question or SQL that are named."""
DRAFTS = 100
"""Synthetic pairs that are asked for, unless --drafts says otherwise."""


@dataclass
class Wanted:
    """The command as typed. folder: None for one named after the data."""

    folder: Path | None = None
    db: Path | None = None
    data: str | None = None
    goal: Goal | None = None
    columns: list[str] = field(default_factory=list)
    dialect: str | None = None
    encoding: str | None = None
    drafts: int = DRAFTS


@dataclass
class Found:
    """What the data are. records: those of the user, of the file `own`, and where each is in it; None where there are none yet,
    or the source is a set that stays where it is."""

    database: Database | None = None
    known: KnownSet | None = None
    records: list[Record] | None = None
    places: list[str] = field(default_factory=list)
    own: Path | None = None
    drafts: Drafts | None = None
    said: list[str] = field(default_factory=list)

    @property
    def is_form(self) -> bool:
        return self.records is None and self.known is None and self.drafts is None


def look(wanted: Wanted) -> Found:
    database = look_at_database(wanted.db, wanted.dialect) if wanted.db is not None else None
    found = Found(database)
    if database is not None:
        found.said += _about_database(database)
    if wanted.data is None:
        if database is not None and database.is_folder:
            raise UserError(
                f"--db {database.path}: several databases, and no questions about them; give them with --data FILE",
                code="init.no_data",
            )
        return found
    known = set_on_hub(wanted.data)
    path = Path(wanted.data).expanduser()
    if known is None and path.is_dir():
        known = set_in_folder(path)
    if known is not None:
        if database is not None:
            raise UserError(
                f"--db {database.path}: {known.path} has its own databases; leave --db out", code="init.two_databases"
            )
        found.known = known
        found.said.append(_about_set(known))
        return found
    table = read_rows(path, wanted.encoding)
    mapped = map_columns(table, wanted.dialect or (database.dialect if database else None), wanted.columns)
    pairs = records_of(table, mapped.columns, database, mapped.dialect)
    found.records, found.places, found.own = pairs.records, pairs.places, path
    found.said += [*table.notes, mapped.why]
    found.said.append(f"{len(pairs.records)} pairs in {mapped.dialect}" + _left_out(pairs.unfilled))
    found.said += pairs.notes
    return found


def _left_out(places: list[str]) -> str:
    if not places:
        return ""
    lines = "line" if places[0].isdecimal() else "at"
    named = ", ".join(places[:SHOWN]) + ", ..." * (len(places) > SHOWN)
    rows = "row" if len(places) == 1 else "rows"
    return f"; {len(places)} {rows} without question or SQL left out ({lines} {named})"


def _about_database(database: Database) -> list[str]:
    if database.is_folder:
        return [f"{database.path}: {len(database.schemas)} SQLite databases, used where they are"]
    count = _count(database.tables)
    if not database.is_executable:
        lines = [
            f"{database.path}: a schema of {count} in {database.dialect}, without rows. SQL is checked by parsing it, and the "
            "model is trained on it; but no SQL can be executed, so there is no execution accuracy. A SQLite copy of the "
            "database, given as --db, would give one (the SQL then has to be SQLite's); no other engine is built in"
        ]
        if database.unshown:
            lines.append(
                f"no prompt shows these types of it: {', '.join(database.unshown)}; only enums, composite types and domains"
            )
        return lines
    filled = database.filled or frozenset()
    lines = [f"{database.path}: {count}, {len(filled)} of them with rows, {database.bytes / 1e6:,.1f} MB"]
    if database.is_linked:
        lines.append(
            f"it is large, so {DATABASES} links to it instead of holding a copy; `finetune data prepare` copies it once into "
            "data/prepared, which a launch uploads"
        )
    if not filled:
        lines.append(
            "WARNING: it has no rows, so no query has a result that tells right from wrong, and a score would say nothing"
        )
    return lines


def _count(tables: Sequence[Table]) -> str:
    """8 tables and 1 view; what there is none of is left out."""
    views = sum(table.is_view for table in tables)
    kinds = [(len(tables) - views, "table"), (views, "view")]
    return " and ".join(f"{number} {kind}{'s' * (number != 1)}" for number, kind in kinds if number)


def _about_set(known: KnownSet) -> str:
    where = f"{known.path} at {known.revision[:7]}" if known.revision else known.path
    count = (
        f"{known.records:,} questions to train on ({', '.join(known.train)})"
        if known.records
        else ", ".join(known.train)
    )
    test = (
        f", {known.questions:,} to test ({', '.join(known.test)})"
        if known.test
        else ", no test file: a tenth is held out"
    )
    left = f"; not used: {', '.join(known.left_out)}" if known.left_out else ""
    return f"{where}: {count}{test}{left}"
