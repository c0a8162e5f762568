"""The folder data/ of a project, and what its config says about it."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.data.prompts import PromptTemplate, completion
from finetune.data.records import Record, write_records
from finetune.errors import UserError
from finetune.init.config_text import CHARACTERS_PER_TOKEN, LEAST_CHARACTERS_PER_TOKEN, Goal, Settings
from finetune.init.database import ENGINE, Database, database_name
from finetune.init.form import FORM, GOOD, form_text
from finetune.init.known_sets import source_lines
from finetune.init.look import DATABASES, Found
from finetune.init.origin import ORIGIN, origin_text
from finetune.init.place import write_file
from finetune.project_folder import PAIRS, ProjectFolder
from finetune.runtime.paths import escaped

SYNTHETIC, SCHEMA = "data/synthetic.jsonl", "data/schema.sql"


def write_data(part: Path, folder: Path, found: Found, before: ProjectFolder | None) -> tuple[list[str], list[str]]:
    """Writes data/; returns the entries of data.sources and what the config says about them."""
    database = found.database
    if found.known is not None:
        return source_lines(found.known), []
    databases = ""
    if database is not None and not database.is_folder:
        write_file(part, SCHEMA, database.schemas[database.db_id] + "\n")
    if database is not None and database.is_folder:
        databases = f", databases: {json.dumps(escaped(str(database.path.resolve())), ensure_ascii=False)}"
    elif database is not None and database.is_executable:
        databases = f", databases: {DATABASES}"
        _write_database(part, folder, database)
    sources, notes = [], []
    if found.records is not None or found.drafts is None:
        sources.append(f"{{kind: jsonl, path: {PAIRS}{databases}}}")
    if found.records is not None:
        write_records(part / PAIRS, found.records)
        if found.own is not None:
            write_file(part, ORIGIN, origin_text(found.own, found.places))
    synthetic = folder / SYNTHETIC
    if found.drafts is not None:
        write_records(part / SYNTHETIC, found.drafts.records)
        sources.append(f"{{kind: jsonl, path: {SYNTHETIC}{databases}}}")
        notes.append("synthetic pairs: a model wrote them, so a score on them says how well yours imitates that model")
    elif found.records is not None and before is not None and SYNTHETIC in before.files and synthetic.is_file():
        write_file(part, SYNTHETIC, synthetic.read_bytes())
        sources.append(f"{{kind: jsonl, path: {SYNTHETIC}{databases}, split: train}}")
        notes.append("the synthetic pairs train only: the score is of your own questions")
    if found.is_form and database is not None and not (folder / FORM).exists():
        write_file(part, FORM, form_text(database))
    return sources, notes


def _write_database(part: Path, folder: Path, database: Database) -> None:
    target = part / DATABASES / database.db_id / f"{database.db_id}.sqlite"
    target.parent.mkdir(parents=True)
    if database.is_linked:
        target.symlink_to(database.path.expanduser().resolve())
        return
    source = database.path
    if source.resolve() == (folder / target.relative_to(part)).resolve() and source.is_symlink():
        source = source.resolve()
    ENGINE.copy(source, target)


def settings_of(folder: Path, goal: Goal, found: Found, sources: list[str], notes: list[str]) -> Settings:
    name = database_name(folder.resolve())
    known = found.known
    if known is not None:
        return Settings(
            name,
            goal,
            tuple(sources),
            known.records,
            bool(known.test),
            True,
            by_database=not known.test,
            questions=known.questions,
        )
    records = found.records or (found.drafts.records if found.drafts else None)
    executable = found.database is not None and found.database.is_executable
    if records is None:
        return Settings(
            name, goal, tuple(sources), GOOD, False, executable, mean_tokens=None, assumed=True,
            notes=(f"written by `finetune init . --data {FORM}`, once the form is filled in",),
        )  # fmt: skip
    lengths = [_characters(record) for record in records]
    return Settings(
        name, goal, tuple(sources), len(records), any(record.split == "test" for record in records), executable,
        questions=sum(record.split == "test" for record in records) or None,
        mean_tokens=sum(lengths) / len(lengths) / CHARACTERS_PER_TOKEN,
        longest=max(lengths) / LEAST_CHARACTERS_PER_TOKEN, notes=tuple(notes),
    )  # fmt: skip


def _characters(record: Record) -> int:
    """Of prompt and answer. A schema that cannot be read counts as it is; the check says so."""
    try:
        prompt = PromptTemplate("compact").render_record(record)
    except UserError:
        prompt = record.schema + record.question
    return len(prompt) + len(completion(record.sql, dialect=record.dialect))
