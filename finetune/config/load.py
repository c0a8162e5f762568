"""Reads a run's YAML against the typed schema of `config.schema`.

One YAML describes one run. `load_config` merges the file and dotlist overrides into `RunConfig`, and reports every mistake at
once: its key, what was expected, and the nearest valid name. Keys keep the names of the original training guide; only
`training.arguments.trainer_arguments` maps them to the libraries' names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import MISSING

from finetune.config.convert import Unfit, convert
from finetune.config.references import Place, References, escaped
from finetune.config.schema import (
    RunConfig,
    SourceSection,
    TrainingSection,
)
from finetune.config.validate import impossible_values
from finetune.config.yaml_text import LARGEST_BYTES, BadYaml, Plain, dump, is_null, like_yaml, parse
from finetune.errors import LONGEST_VALUE, MOST_LISTED, UserError, combined, shortened, shown
from finetune.run_record import OLD_BACKENDS
from finetune.runtime.console import say
from finetune.runtime.files import read_bytes
from finetune.runtime.installed import in_checkout, project_files

EFFECTIVE_BATCH = 16
"""Examples per optimizer step where the config does not say: the guide's 4 x 4."""
RENAMED_VALUES = {"training.kernels": OLD_BACKENDS}
"""Old names of values, which the configs of older runs still use: key -> old name -> new name."""
_warned: set[tuple[str, str]] = set()


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML and dotlist overrides (`training.num_train_epochs=1`) into a checked `RunConfig`.

    A key that is a text keeps it as written, also where YAML would read a number; in a key that is a path, `~` and variables
    are expanded. Raises UserError that lists every unknown key, ill-typed value, missing key and impossible value, each with
    its key.
    """
    tree = _read_yaml(path)
    problems: list[UserError] = []
    for override in overrides or []:
        _merge_override(tree, override, problems)
    return _checked(tree, str(path), problems, References(tree))


def with_numbers(text: str, section: str, numbers: Mapping[str, float], result: RunConfig) -> str:
    """The YAML text with these values set in one section; comments and everything else stay.

    result: the config that the new text must load as. Where it does not, because other values refer to a changed one, the
    whole resolved config is written instead, with the comments at the top of the file.
    """
    edited = text
    for name, value in numbers.items():
        edited = _with_number(edited, section, name, repr(value))
    try:
        tree = parse(edited)
        if to_dict(_checked(tree, "", [], References(tree))) == to_dict(result):
            return edited
    except Exception:  # no longer valid YAML, or not a valid config
        pass
    comments = "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    return comments + to_yaml(result)


def _with_number(text: str, section: str, name: str, shown: str) -> str:
    root = yaml.compose(text)
    node = _child(root, section)
    if node is None:
        return f"{text.rstrip()}\n{section}:\n  {name}: {shown}\n"
    old = _child(node, name)
    if old is not None:
        begin, end, new = old.start_mark.index, old.end_mark.index, shown
    elif isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        key = node.value[0][0].start_mark
        begin = end = key.index
        new = f"{name}: {shown}\n{' ' * key.column}"
    elif isinstance(node, yaml.MappingNode):
        begin = end = node.start_mark.index + 1
        new = f"{name}: {shown}" + (", " if node.value else "")
    else:  # a section whose keys are all commented out
        begin, end, new = node.start_mark.index, node.end_mark.index, f"{{{name}: {shown}}}"
    return text[:begin] + (" " if text[begin - 1] == ":" else "") + new + text[end:]


def _child(node: yaml.Node | None, name: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def examples_per_step(training: TrainingSection, gpus: int = 1) -> int:
    """Examples in one optimizer step over all GPUs: the effective batch size, which affects what is learned.

    Raises UserError where the keys contradict each other.
    """
    micro_batch_size, effective = training.per_device_train_batch_size, training.effective_batch_size
    if micro_batch_size == "auto" or (training.gradient_accumulation_steps is None and effective is not None):
        return effective or EFFECTIVE_BATCH
    product = micro_batch_size * (training.gradient_accumulation_steps or 1) * gpus
    if effective not in (None, product):
        raise UserError(
            f"training.effective_batch_size: {effective} is not {product}, the product of per_device_train_batch_size, "
            f"gradient_accumulation_steps and {gpus} GPUs; leave one of the three out",
            code="config.conflicting_values",
        )
    return product


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, ready for YAML or JSON."""
    return asdict(config)


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The inverse of `to_dict`, as strict as `load_config`: values are resolved, so texts in them are no references.

    origin: names the file in errors.
    """
    return _checked(values, origin, [], None)


def _checked(tree: Any, origin: str, problems: list[UserError], references: References | None) -> RunConfig:
    if not isinstance(tree, dict):
        raise UserError(
            f"{origin}: expected sections such as model: and training:, found {shown(tree)}", code="config.bad_yaml"
        )
    config: RunConfig = _Reader(references, problems).section(_with_new_names(tree, origin), RunConfig, ())
    if not problems:
        problems = [UserError(problem, code="config.bad_value") for problem in impossible_values(config)]
    if problems:
        raise combined(problems, origin, code="config.several")
    return config


def _with_new_names(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    for place, names in RENAMED_VALUES.items():
        section, key = place.split(".")
        found = tree.get(section)
        old = found.get(key) if isinstance(found, dict) else None
        if isinstance(old, str) and old in names:
            if origin and (place, old) not in _warned:
                _warned.add((place, old))
                say(f"{origin}: {place}: {old} is now called {names[old]}; both names are accepted")
            tree = tree | {section: {**tree[section], key: names[old]}}
    return tree


def to_yaml(config: RunConfig) -> str:
    """The resolved config as a file that loads as an equal one, on this machine and with other YAML readers."""
    return dump(escaped(to_dict(config)))


def data_key(config: RunConfig) -> str:
    """A hash of the config's data section, 12 hex digits; the name under which the bucket knows its prepared data."""
    section = to_dict(config)["data"]
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:12]


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of the resolved config, independent of key order and comments."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, LARGEST_BYTES)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such config file" if missing else f"cannot be read as a config file: {error.strerror}"
        examples = "configs/" if in_checkout() else project_files() / "configs"
        raise UserError(
            f"{path}: {what}; see {examples} for examples",
            code="config.not_found",
        ) from error
    try:
        tree = parse(content)
    except BadYaml as error:
        raise UserError(f"{path}: not valid YAML: {error}", code="config.bad_yaml") from error
    if is_null(tree):
        return {}
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else "a text"
        raise UserError(
            f"{path}: expected sections such as model: and training:, found {found}", code="config.bad_yaml"
        )
    return tree


def _merge_override(tree: dict[str, Any], override: str, problems: list[UserError]) -> None:
    def refuse(why: str) -> None:
        problems.append(UserError(f"override {shown(override)}: {why}", code="config.bad_override"))

    key, sign, text = override.partition("=")
    *sections, name = key.split(".")
    if not sign or not all([*sections, name]) or "[" in key:
        refuse("expected key=value, such as training.num_train_epochs=1")
        return
    try:
        value = _value_of_override(text, _is_text(sections, name))
    except BadYaml as error:
        refuse(str(error))
        return
    for section in sections:
        if is_null(tree.get(section)):
            tree[section] = {}
        if not isinstance(tree[section], dict):
            refuse(f"{section} is not a section of keys")
            return
        tree[section] = dict(tree[section])  # it may be an alias of another section
        tree = tree[section]
    tree[name] = value


def _value_of_override(text: str, is_text: bool) -> Any:
    """A text stays as typed, unless the whole of it is in quotes; any other value is YAML."""
    if not is_text:
        value = parse(text)
        return Plain("") if value is None else value
    if text[:1] in ("'", '"') and text[:1] == text[-1:]:
        try:
            if isinstance(value := parse(text), str):
                return value
        except BadYaml:
            pass
    return Plain(text)


def _is_text(sections: list[str], name: str) -> bool:
    schema: Any = RunConfig
    for section in sections:
        schema = get_type_hints(schema).get(section) if is_dataclass(schema) else None
    hint = get_type_hints(schema).get(name) if is_dataclass(schema) else None
    return hint is str or (str in get_args(hint) and len(get_args(hint)) == 2 and type(None) in get_args(hint))


class _Reader:
    """Makes sections of the schema from parsed values; what does not fit becomes one of `problems`."""

    def __init__(self, references: References | None, problems: list[UserError]) -> None:
        self._references, self._problems = references, problems

    def section(self, values: dict[Any, Any], schema: type, place: Place) -> Any:
        """An instance of the dataclass `schema`; it is complete only if no problem was found."""
        made, hints = schema(), get_type_hints(schema)
        for key in [key for key in values if key not in hints]:
            name = _dotted((*place, shown(str(key))[1:-1]))
            near = _nearest(str(key), place, list(hints)) if len(self._problems) < MOST_LISTED else ""
            self._problems.append(UserError(f"unknown key {name}{near}", code="config.unknown_key"))
        for field in fields(schema):
            here = (*place, field.name)
            if field.name in values:
                setattr(made, field.name, self._value(values[field.name], schema, field.name, hints[field.name], here))
            elif field.default == MISSING:
                self._problems.append(UserError(f"missing key {_dotted(here)}", code="config.missing_key"))
            elif is_dataclass(hints[field.name]):
                setattr(made, field.name, self.section({}, hints[field.name], here))  # type: ignore[arg-type]
        return made

    def _value(self, value: Any, schema: type, key: str, hint: Any, place: Place) -> Any:
        if is_dataclass(hint):
            if not isinstance(value, dict) and not is_null(value):  # null: all keys of the section are commented out
                return self._expected("a section of keys", value, place)
            return self.section({} if is_null(value) else value, hint, place)  # type: ignore[arg-type]
        if hint == list[SourceSection]:
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                return self._expected("a list of sources, each with kind and path", value, place)
            return [self.section(item, SourceSection, (*place, str(number))) for number, item in enumerate(value)]
        try:
            filled_in = value if self._references is None else self._references.filled_in(value, place)
            return convert(hint, filled_in)
        except Unfit:
            return self._expected(_describe(schema, key), filled_in, place)
        except UserError as error:
            self._problems.append(UserError(f"{_dotted(place)}: {error}", code=error.code))
            return None

    def _expected(self, what: str, value: Any, place: Place) -> None:
        self._problems.append(
            UserError(f"{_dotted(place)}: expected {what}, found {_found(value)}", code="config.bad_type")
        )


def _dotted(place: Place) -> str:
    """The place as people write it: data.sources[0].path."""
    return "".join(f"[{key}]" if key.isdecimal() else f".{key}" for key in place).removeprefix(".")


def _found(value: Any, depth: int = 3) -> str:
    """A value as an error shows it; what YAML takes for a number, a truth value or null has no quotes there."""
    if is_null(value):
        return "null"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Plain):
        return shown(value)[1:-1] if like_yaml(value) else shown(value)
    if isinstance(value, list | dict):
        if depth == 0:
            return "…"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        few = [(shown(key), _found(item, depth - 1)) for key, item in islice(items, 6)]
        parts = [f"{key}: {item}" if isinstance(value, dict) else item for key, item in few]
        inside = ", ".join([*parts, *["…"][: len(value) - len(parts)]])
        return shortened(f"{{{inside}}}" if isinstance(value, dict) else f"[{inside}]", LONGEST_VALUE)
    return shown(value)


def _describe(schema: type, key: str) -> str:
    hint = str(schema.__annotations__[key]).replace("PathText", "str")
    if hint == "Dtype":
        return "one of auto, bfloat16, float16, float32"
    if hint.startswith("Literal["):
        return "one of " + hint.removeprefix("Literal[").rstrip("]").replace('"', "").replace("'", "")
    return hint


def _nearest(key: str, place: Place, names: list[str]) -> str:
    """A hint with the nearest valid name: in this section first, then anywhere in the schema."""
    close = difflib.get_close_matches(key[:100], names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {_dotted((*place, close[0]))}?)"
    everywhere = {
        name: f"{section.name}.{name}"
        for section in fields(RunConfig)
        for name in (f.name for f in fields(get_type_hints(RunConfig)[section.name]))
    }
    close = difflib.get_close_matches(key[:100], list(everywhere), n=1, cutoff=0.75)
    return f" (did you mean {everywhere[close[0]]}?)" if close else f" (valid here: {', '.join(names)})"
