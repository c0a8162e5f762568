"""`finetune init`, step by step: look, ask, write into a part folder, check there, put it into place."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from finetune.errors import UserError
from finetune.init.ask import Asker
from finetune.init.config_text import CONFIG, TASKS, Goal, config_text
from finetune.init.data_files import settings_of, write_data
from finetune.init.database import Database, database_name
from finetune.init.drafts import MODEL, URL, Drafts, Writer, draft, writer_in
from finetune.init.files import readme, settings_files, task_files
from finetune.init.form import FORM, LEAST, rule_of_thumb
from finetune.init.look import DATABASES, Found, Wanted, look
from finetune.init.outlook import Outlook, look_ahead
from finetune.init.place import checkout_around, part_folder, place, usable_folder, write_file
from finetune.project_folder import PAIRS, ProjectFolder, machine_side, read_project
from finetune.runtime.installed import version


@dataclass
class Made:
    """What init has done. said: lines for the user. commands: to type next in the folder, each with why. step: before them, what
    the user does by hand. task: the YAML of this goal."""

    folder: Path
    said: list[str]
    commands: list[tuple[str, str]]
    by_hand: str = ""
    kept: list[str] = field(default_factory=list)
    task: str = ""


def init(wanted: Wanted, ask: Asker, say: Callable[[str], None]) -> Made:
    """Raises UserError, before anything is written, for what cannot be used."""
    before = _with_project(wanted)
    _ask_for_data(wanted, ask)
    folder = wanted.folder or Path(_default_name(wanted))
    given = [Path(path).expanduser() for path in (wanted.db, wanted.data) if path is not None]
    before = usable_folder(folder, given) if before is None else before
    found = look(wanted)
    writer = writer_in() if found.is_form and wanted.drafts and _has_rows(found.database) else None
    if writer is not None:
        found.drafts = _drafted(writer, cast(Database, found.database), wanted.drafts, ask, say)
    if found.drafts is not None:
        trouble = f"; it ended early: {found.drafts.trouble}" if found.drafts.trouble else ""
        found.said += [f"{found.drafts}{trouble}", "read data/synthetic.jsonl before you trust a score on it"]
    elif found.is_form and wanted.drafts and os.environ.get(URL) and not os.environ.get(MODEL):
        found.said.append(f"{URL} is set, but {MODEL} names no model that could draft questions, so none are drafted")
    if wanted.goal is None:
        wanted.goal = cast(Goal, ask("what matters more", "cheap", ("cheap", "fast")))
    if before is None and (checkout := checkout_around(folder)):
        found.said.append(
            f"{folder} lies in the git checkout {checkout}, which sees it as new files: commit or ignore them there"
        )
    with part_folder(folder) as part:
        made = _written(part, folder, wanted, found, before)
        made.kept = place(part, folder, before, _asked(wanted) | {"task": made.task})
    return made


def _with_project(wanted: Wanted) -> ProjectFolder | None:
    """Takes what was asked for before where the folder is a project of ours."""
    project = read_project(wanted.folder) if wanted.folder is not None else None
    if project is not None:
        wanted.db = wanted.db or _database_of(project)
        wanted.goal = wanted.goal or project.asked.get("goal")
        wanted.dialect = wanted.dialect or project.asked.get("dialect")
        wanted.data = wanted.data or project.asked.get("data")
    return project


def _database_of(project: ProjectFolder) -> Path | None:
    """Of which init was asked before; the project's copy if it is gone."""
    if not project.asked.get("db"):
        return None
    given = Path(project.asked["db"])
    copies = [] if given.exists() else sorted((project.path / DATABASES).glob(f"{database_name(given)}/*.sqlite"))
    return copies[0] if copies else given


def _asked(wanted: Wanted) -> dict[str, Any]:
    db = str(wanted.db.expanduser().resolve()) if wanted.db else None
    data = str(Path(wanted.data).expanduser().resolve()) if wanted.data and Path(wanted.data).exists() else wanted.data
    return {"db": db, "data": data, "goal": wanted.goal, "dialect": wanted.dialect}


def _ask_for_data(wanted: Wanted, ask: Asker) -> None:
    if wanted.db is None and wanted.data is None and wanted.folder is not None and wanted.folder.is_file():
        name = shlex.quote(str(wanted.folder))
        raise UserError(
            f"{wanted.folder}: a file; expected the name of a new folder. As a database it is `--db {name}`, as questions with "
            f"their SQL `--data {name}`",
            code="init.no_folder",
        )
    if wanted.db is None and wanted.data is None:
        if answer := ask("your database: a SQLite file, or its schema as .sql (empty: none)"):
            wanted.db = Path(answer).expanduser()
        if answer := ask("your questions with SQL: CSV, JSON, parquet, a Spider folder or hub id (empty: none)"):
            wanted.data = answer
    if wanted.db is None and wanted.data is None:
        raise UserError(
            "nothing to start from: give a database (--db FILE.sqlite), questions with their SQL and a schema (--data PAIRS.csv "
            "--db SCHEMA.sql), or a known set (--data premai-io/spider)",
            code="init.nothing_given",
        )


def _default_name(wanted: Wanted) -> str:
    return database_name(wanted.db or Path((wanted.data or "").split("/")[-1] or "text2sql"))


def _has_rows(database: Database | None) -> bool:
    return database is not None and bool(database.filled)


def _drafted(writer: Writer, database: Database, wanted: int, ask: Asker, say: Callable[[str], None]) -> Drafts | None:
    if ask(f"let {writer} draft {wanted} questions? It is shown the schema, no rows", "yes", ("yes", "no")) == "no":
        return None
    say(f"{writer} drafts {wanted} pairs; it is shown the schema, no rows (--drafts 0: none)")
    try:
        drafts = draft(writer, database, wanted)
    except UserError as error:
        if error.code.startswith("endpoint."):
            say(f"no drafts: {error}")
            return None
        raise
    if len(drafts.records) < LEAST:
        say(f"no drafts: {drafts}, and at least {LEAST} are needed" + (f"; {drafts.trouble}" if drafts.trouble else ""))
        return None
    return drafts


def _written(part: Path, folder: Path, wanted: Wanted, found: Found, before: ProjectFolder | None) -> Made:
    goal = cast(Goal, wanted.goal)
    said = list(found.said)
    sources, notes = write_data(part, folder, found, before)
    settings = settings_of(folder, goal, found, sources, notes)
    kept = before is not None and before.is_changed(CONFIG)  # what is looked at is what will be used
    write_file(part, CONFIG, (folder / CONFIG).read_bytes() if kept else config_text(settings, version()))
    there = folder.resolve() if kept else None
    with chdir(part):
        outlook = look_ahead(goal, checked=not found.is_form and found.known is None, places=found.places, folder=there)
    if before is not None and not kept and PAIRS in before.files and outlook.problems:
        raise UserError(
            f"--data {wanted.data}: {'; '.join(outlook.problems)}; {folder} keeps the pairs that it has",
            code="init.unusable_data",
        )
    goal = outlook.goal
    settings = replace(settings, goal=goal, figures=outlook.figures)
    write_file(part, CONFIG, config_text(settings, version()))
    said += outlook.said
    executable = settings.executable
    for name, text in (
        task_files(goal=goal, run_usd=outlook.run_usd, executable=executable) | settings_files()
    ).items():
        write_file(part, name, text)
    for name, content in machine_side().items():
        write_file(part, name, content)
    made = Made(folder, said, *_next(goal, found, outlook), task=TASKS[goal])
    described = (
        "Fill in the form first: " + FORM if found.is_form else f"The data: {found.said[0] if found.said else ''}"
    )
    anywhere, _ = _next(goal, found, replace(outlook, install_cloud=None, install_hub=None))
    commands = [f"{command:<44} # {why}" for command, why in anywhere]
    write_file(
        part,
        "README.md",
        readme(settings.name, goal, described=described, commands=commands, own_data=found.known is None),
    )
    return made


def _next(goal: Goal, found: Found, outlook: Outlook) -> tuple[list[tuple[str, str]], str]:
    launch = (
        f"finetune launch {TASKS[goal]}",
        f"trains on Google Cloud, and stops at ${outlook.run_usd:g}" if outlook.run_usd else "trains on Google Cloud",
    )
    if outlook.install_cloud:
        launch = (f"{outlook.install_cloud} && {launch[0]}", launch[1])
    plan = (f"finetune plan {CONFIG}", "what it costs on each GPU")
    if found.is_form:
        by_hand = f"fill in {FORM} (question and SQL; the column `about` is a suggestion): {rule_of_thumb()}"
        return [(f"finetune init . --data {FORM}", "goes on with it"), plan, launch], by_hand
    if outlook.problems:
        why = "lists every fault, to be repaired in the file you gave; then init again"
        return [(f"finetune data check {CONFIG}", why)], ""
    if found.known is not None and found.known.revision and outlook.install_hub:
        return [
            plan,
            (f"{outlook.install_hub} && finetune data prepare {CONFIG}", "downloads and checks the set"),
            launch,
        ], ""
    by_hand = ""
    if outlook.rejected and found.own is not None:
        by_hand = (
            f"repair the {outlook.rejected} rejected in {found.own} and type the same again, or go on without them"
        )
    return [(f"finetune data prepare {CONFIG}", "checks and splits the pairs"), plan, launch], by_hand


def cd_command(folder: Path) -> str | None:
    """The command that goes to the folder; None if it is the current one."""
    if folder.resolve() == Path.cwd():
        return None
    return f"cd {shlex.quote(os.fspath(folder))}"
