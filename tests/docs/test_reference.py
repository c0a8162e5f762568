"""The pages that are made from the code say everything that the code has."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import markdown  # type: ignore[import-untyped]
import pytest

from dev import docs_hooks, docs_reference
from finetune.cli import main as cli
from finetune.config import resume_rules, schema
from finetune.errors import EXIT_INTERRUPTED, EXIT_MISSING, EXIT_OK, EXIT_TRANSIENT, EXIT_USER_ERROR
from tests.cli.test_main import COMMANDS
from tests.helpers.doc_pages import DOCS

CONFIG = docs_reference.config_reference()
COMMAND_LINE = docs_reference.cli_reference()


def rows(page: str) -> dict[str, list[str]]:
    """First cell, without its backticks -> the other cells."""
    found = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            first, *others = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[first.strip("`")] = others
    return found


def keys() -> list[tuple[str, str, dataclasses.Field[object]]]:
    """(section, key, field) of every key, also of a source."""
    sections = {field.name: getattr(schema, str(field.type)) for field in dataclasses.fields(schema.RunConfig)}
    return [
        (section, name, field)
        for section, cls in {**sections, "": schema.SourceSection}.items()
        for name, field in ((field.name, field) for field in dataclasses.fields(cls))
    ]


@pytest.mark.parametrize(("section", "name", "field"), keys(), ids=lambda value: str(getattr(value, "name", value)))
def test_every_config_key_has_a_row(section: str, name: str, field: dataclasses.Field[object]) -> None:
    value, default, what, when_resumed = rows(CONFIG)[f"{section}.{name}" if section else name]
    assert value and default and len(what) > 5 and when_resumed, name
    if isinstance(field.default, bool):
        assert default == f"`{str(field.default).lower()}`"
    elif isinstance(field.default, int | float):
        assert float(default.strip("`")) == field.default


def test_choices_are_shown_as_they_are_typed() -> None:
    shown = markdown.markdown(COMMAND_LINE, extensions=["tables"])
    assert "<td><code>--goal cheap|fast</code></td>" in shown and "\\|" not in shown


def test_rows_say_what_the_code_says() -> None:
    found = rows(CONFIG)
    assert found["training.optim"][0].startswith("`adamw_torch`, `adamw_torch_fused`, `adamw_8bit`")
    assert found["training.learning_rate"][1] == "`0.0002`"
    assert found["model.name"][1:3] == [
        "required",
        "a hub id, a local folder, or package://&lt;module&gt;/&lt;file&gt;.gguf",
    ]
    assert found["budget.max_hours"][3] == f"applies: {resume_rules.RULES['budget.max_hours'].why}"
    assert found["lora.r"][3].startswith("refused: ")
    assert found["checkpoint.every_minutes"][:2] == ["number, null", "`10.0`"]


def test_descriptions_are_for_keys_that_have_no_comment() -> None:
    comments = docs_reference.config_comments()
    classes = {field.name: str(field.type) for field in dataclasses.fields(schema.RunConfig)}
    for key in docs_reference.WITHOUT_A_COMMENT:
        section, _, name = key.rpartition(".")
        cls = "SourceSection" if section == "data.sources" else classes[section]
        assert comments[cls, name] == "", f"{key} has a comment in schema.py now"


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command not in {("data",), ("job",), ("generate",)}], ids=" ".join
)
def test_every_command_has_a_section_with_every_option(command: tuple[str, ...]) -> None:
    heading = " ".join(("finetune", *command))
    section = COMMAND_LINE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert "usage: finetune" in section and "Example:" in section
    parser = cli._parser()
    for word in command:
        [subs] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = subs.choices[word]
    options = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
    assert all(f"{name}" in section for name in options)
    assert section.count("| `") == sum(
        not isinstance(action, argparse._SubParsersAction | argparse._HelpAction) for action in parser._actions
    )


def test_an_old_name_of_a_command_has_no_section_of_its_own() -> None:
    assert ("generate",) in COMMANDS and "finetune generate" not in COMMAND_LINE


def test_exit_codes_are_those_of_the_program() -> None:
    text = (DOCS / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert listed == {EXIT_OK, EXIT_MISSING, EXIT_USER_ERROR, EXIT_TRANSIENT, EXIT_INTERRUPTED, 128 + 15}


def test_links_to_the_repository_become_paths() -> None:
    text = "[schema.py](../finetune/config/schema.py), [here](cloud.md), [gone](../finetune/gone.py), [out](../../x), [w](https://a.b)"
    shown, missing = docs_hooks.without_links_to_the_repository(text, Path())
    assert shown.startswith("`finetune/config/schema.py`, [here](cloud.md), gone (`finetune/gone.py`)")
    assert missing == ["../finetune/gone.py", "../../x"] and shown.endswith("[w](https://a.b)")


def test_the_page_of_the_notebook_has_its_cells() -> None:
    page = docs_hooks.notebook_page()
    assert page.startswith("# ") and page.count("```python") >= 4 and "## Ask" in page
