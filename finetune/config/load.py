"""Reads a run's YAML against the typed schema of `config.schema`.

One YAML describes one run. `load_config` merges the file and dotlist overrides into `RunConfig`, and reports every mistake at
once: its key, what was expected, and the nearest valid name. Keys keep the names of the original training guide; only
`training.arguments.trainer_arguments` maps them to the libraries' names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from finetune.config.reader import Reader
from finetune.config.references import References, escaped
from finetune.config.schema import RunConfig, TrainingSection
from finetune.config.validate import impossible_values
from finetune.config.yaml_text import LARGEST_BYTES, BadYaml, Plain, dump, is_null, parse
from finetune.errors import UserError, combined, shown
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


def gpus_that_agree(training: TrainingSection, counts: Iterable[int]) -> int:
    """The smallest of these numbers of GPUs on which the keys of the batch size do not contradict each other. Raises UserError
    like `examples_per_step` if they do on each."""
    *others, last = sorted(set(counts))
    for gpus in others:
        with suppress(UserError):
            examples_per_step(training, gpus)
            return gpus
    examples_per_step(training, last)
    return last


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
    config: RunConfig = Reader(references, problems).section(_with_new_names(tree, origin), RunConfig, ())
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
    tree[name] = _merged(tree.get(name), value)


def _merged(before: Any, value: Any) -> Any:
    """A section sets the keys that it names, as in a file of OmegaConf's; a list replaces the whole list."""
    if not isinstance(before, dict) or not isinstance(value, dict):
        return value
    return before | {key: _merged(before.get(key), item) for key, item in value.items()}


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
