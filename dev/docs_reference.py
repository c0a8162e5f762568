"""Two pages of the site: every key of the config, from its schema, and every command, from its parser."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import html
import io
import json
import os
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from finetune.cli import main as cli
from finetune.config import resume_rules, schema

TYPES = {
    "None": "null",
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true, false",
    "PathText": "path",
    "Dtype": "`auto`, `bfloat16`, `float16`, `float32`",
    "list[str]": "list of texts",
    "list[PathText]": "list of paths",
    "dict[str, str]": "text to text",
    "list[SourceSection]": "list, see below",
}
WITHOUT_A_COMMENT = {
    "model.attn_implementation": "which attention computes the model; auto: by model, GPU and dtype",
    "model.trust_remote_code": "run Python code that comes with a hub model",
    "quantization.load_in_4bit": "hold the frozen base model in 4 bits",
    "quantization.bnb_4bit_quant_type": "the 4-bit type of bitsandbytes",
    "quantization.bnb_4bit_use_double_quant": "quantise the scales, too",
    "lora.r": "rank of the adapters",
    "lora.lora_alpha": "weight of the adapters, divided by r",
    "lora.lora_dropout": "dropout in front of the adapters, in training",
    "lora.target_modules": "the linear layers that get adapters",
    "data.sources": "what is read",
    "data.sources.kind": "the format",
    "data.sources.dialect": "of the SQL, by sqlglot's name",
    "data.test_fraction": "of the records whose split is auto",
    "data.split_by": "question: no question or gold SQL is in two splits; database: no database is, either",
    "data.max_train_records": "a seeded sample of the training records; null: all",
    "data.seed": "of the splits and the sample",
    "training.output_dir": "folder of the runs",
    "training.seed": "of adapters, order and dropout",
    "training.num_train_epochs": "passes over the training examples",
    "training.per_device_eval_batch_size": "examples in a batch of the validation",
    "training.learning_rate": "its highest value",
    "training.lr_scheduler_type": "how it falls after the warm-up",
    "training.weight_decay": "of AdamW",
    "training.max_grad_norm": "gradients are clipped to this norm",
    "training.optim": "AdamW; 8bit: states in 8 bits; paged: moved out of GPU memory when it is short",
    "training.logging_steps": "optimizer steps between two log entries",
    "checkpoint.keep_last": "newest checkpoints that are kept",
    "tracking.wandb_project": "project at W&B",
    "evaluation.split": "which questions are asked",
    "evaluation.batch_size": "questions answered at once by the generator hf",
    "evaluation.max_new_tokens": "of one answer; a longer one is cut off",
}
"""Keys whose name says it to the reader of the schema, but not to a reader of the table."""
POSITIONALS = {
    "CONFIG": "a run's YAML",
    "RUN": "a run's folder",
    "RUN|EXPORT": "the folder of a run or of an export",
    "RUN|gs://BUCKET/runs/NAME": "a run's folder, here or in a bucket",
    "QUESTION": "in plain words",
    "shell": "for which shell",
}
"""Arguments without a help text of their own."""


def config_reference() -> str:
    lines = [
        "# Config",
        "",
        "Every key of a run's YAML, from `finetune/config/schema.py`. A key that is left out has its default; a misspelt key is",
        "an error that names the nearest valid one. On the command line: `finetune train CONFIG training.num_train_epochs=1`.",
        "Texts stay as written (`revision: 12e4567`); `~`, `$HOME` and `${oc.env:DATA_DIR}` work in paths only, and a literal",
        r"dollar sign there is `\$`. `finetune config CONFIG` prints a config with all its values.",
        "",
        "The last column says what `--resume` does with a value that was changed in the run's `config.yaml`.",
        "[Compared with the guide](../guide.md) says why the important values are what they are.",
    ]
    for section in dataclasses.fields(schema.RunConfig):
        lines += ["", f"## {section.name}", "", *_section(str(section.type), f"{section.name}.")]
        if section.name == "data":
            lines += ["", "### data.sources", "", "A list. Of each source:", ""]
            lines += _section("SourceSection", "data.sources.")
    return "\n".join(lines) + "\n"


def _section(type_name: str, prefix: str) -> list[str]:
    cls = getattr(schema, type_name)
    lines = ["| key | value | default | what it is | when resumed |", "|---|---|---|---|---|"]
    comments = config_comments()
    types = {
        node.target.id: node.annotation
        for node in _class(type_name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for field in dataclasses.fields(cls):
        cells = (
            f"`{prefix.removeprefix('data.sources.')}{field.name}`",
            _type(types[field.name]),
            _default(field),
            _text(comments.get((type_name, field.name)) or WITHOUT_A_COMMENT[prefix + field.name]),
            _when_resumed("data.sources" if prefix == "data.sources." else prefix + field.name),
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def config_comments() -> dict[tuple[str, str], str]:
    """The comment of each key: (class, key) -> text."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    at_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[cls.name, node.target.id] = " ".join(at_line[line] for line in lines if line in at_line)
    return found


def _class(name: str) -> ast.ClassDef:
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _type(annotation: ast.expr) -> str:
    parts: list[str] = []
    for part in _alternatives(annotation):
        if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
            values = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            parts += [f"`{value.value!s}`" for value in values if isinstance(value, ast.Constant)]
        else:
            parts.append(TYPES[ast.unparse(part)])
    return ", ".join(parts)


def _alternatives(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    else:
        yield node


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return "required"
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value) or "none"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) and value != {} else f"`{value}`" if value else "none"


def _when_resumed(key: str) -> str:
    if key in resume_rules.BATCH_KEYS:
        return "refused if the examples of a step change"
    if key in resume_rules.ORDER_KEYS:
        return "refused if it changes the order of the examples"
    rule = resume_rules.RULES[key]
    return f"{'applies' if rule.applies else 'refused'}: {rule.why}"


# The command line


def cli_reference() -> str:
    lines = [
        "# Commands",
        "",
        "Every command with its options, from the command line's own parser; `--help` of each says the same.",
        "[Exit codes](exit-codes.md) are the same for all. `KEY=VALUE` overrides a [config key](config.md).",
    ]
    for words, parser in commands(cli._parser()):
        lines += _command(words, parser)
    return "\n".join(lines) + "\n"


def commands(parser: argparse.ArgumentParser, words: str = "finetune") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its parser, but not old names, which `--help` does not list either."""
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subs or words == "finetune":
        yield words, parser
    for action in subs:
        for listed in action._choices_actions:
            yield from commands(action.choices[listed.dest], f"{words} {listed.dest}")


def _command(words: str, parser: argparse.ArgumentParser) -> list[str]:
    lines = ["", f"## {words}", "", _text(parser.description or ""), "", "```", _usage(parser), "```", ""]
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
            name += f" {values}"
        help_text = action.help % {**vars(action), "prog": parser.prog} if action.help else POSITIONALS[name]
        rows.append(f"| `{name}` | {_cell(_text(help_text))} |")
    if rows:
        lines += ["| argument | what it is |", "|---|---|", *rows, ""]
    example = (parser.epilog or "").partition("example:\n")[2]
    return [*lines, "Example:", "", "```", *(line.strip() for line in example.splitlines()), "```"]


def _cell(text: str) -> str:
    """Not for a cell that is all code: there the backslash would be shown, and a pipe divides nothing."""
    return text.replace("|", r"\|")


def _usage(parser: argparse.ArgumentParser) -> str:
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        return parser.format_usage().strip()
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _text(text: str) -> str:
    """Help text as markdown: nothing in it is markup but code between backticks."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)
