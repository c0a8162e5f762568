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
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config.schema import (
    RunConfig,
    SourceSection,
    TrainingSection,
)
from finetune.config.validate import impossible_values
from finetune.errors import UserError, combined, first_line
from finetune.run_record import OLD_BACKENDS
from finetune.runtime.console import say

EFFECTIVE_BATCH = 16
"""Examples per optimizer step where the config does not say: the guide's 4 x 4."""
RENAMED_VALUES = {"training.kernels": OLD_BACKENDS}
"""Old names of values, which the configs of older runs still use: key -> old name -> new name."""
_warned: set[tuple[str, str]] = set()


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML and dotlist overrides (`training.num_train_epochs=1`) into a checked `RunConfig`.

    Raises UserError that lists every unknown key, ill-typed value, missing key and impossible value, each with its key.
    """
    tree = _read_yaml(path)
    problems: list[UserError] = []
    for override in overrides or []:
        _merge_override(tree, override, problems)
    return _checked(tree, str(path), problems)


def with_numbers(text: str, section: str, numbers: Mapping[str, float], result: RunConfig) -> str:
    """The YAML text with these values set in one section; comments and everything else stay.

    result: the config that the new text must load as. Where it does not, because other values refer to a changed one, the
    whole resolved config is written instead, with the comments at the top of the file.
    """
    edited = text
    for name, value in numbers.items():
        edited = _with_number(edited, section, name, repr(value))
    try:
        if to_dict(from_dict(_tree(edited), "")) == to_dict(result):
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


def _tree(text: str) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.create(text))
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


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
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The inverse of `to_dict`, as strict as `load_config`; `origin` names the file in errors."""
    return _checked(values, origin, [])


def _checked(tree: dict[str, Any], origin: str, problems: list[UserError]) -> RunConfig:
    values = _check_section(_with_new_names(tree, origin), RunConfig, "", problems)
    if not problems:
        try:
            config: RunConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))  # type: ignore[assignment]
        except OmegaConfBaseException as error:  # a ${reference} that does not resolve, or resolves to another type
            problems = [UserError(f"{error.full_key}: {first_line(error)}", code="config.bad_reference")]
        else:
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
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def data_key(config: RunConfig) -> str:
    """A hash of the config's data section, 12 hex digits; the name under which the bucket knows its prepared data."""
    section = to_dict(config)["data"]
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:12]


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of the resolved config, independent of key order and comments."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such config file; see configs/ for examples", code="config.not_found")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}", code="config.bad_yaml") from error
    except Exception as error:  # PyYAML raises several types, each with line and column
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}", code="config.bad_yaml") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: expected sections such as model: and training:, found {type(tree).__name__}",
            code="config.bad_yaml",
        )
    return {str(key): value for key, value in tree.items()}


def _merge_override(tree: dict[str, Any], override: str, problems: list[UserError]) -> None:
    key, sign, text = override.partition("=")
    *sections, name = key.split(".")
    if not sign or not all([*sections, name]) or "[" in key:
        problems.append(
            UserError(
                f"override {override!r}: expected key=value, such as training.num_train_epochs=1",
                code="config.bad_override",
            )
        )
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:
        problems.append(UserError(f"override {override!r}: {first_line(error)}", code="config.bad_override"))
        return
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            problems.append(
                UserError(f"override {override!r}: {section} is not a section of keys", code="config.bad_override")
            )
            return
        tree = tree[section]
    assert isinstance(value, dict)
    tree[name] = value["value"]


def _check_section(values: dict[Any, Any], schema: type, where: str, problems: list[UserError]) -> dict[str, Any]:
    """Check one section against its dataclass; append problems, return the valid values."""
    known = {f.name: f for f in fields(schema)}
    hints = get_type_hints(schema)
    passed: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{where}{key}"
        if key not in known:
            problems.append(
                UserError(f"unknown key {place}{_nearest(str(key), where, list(known))}", code="config.unknown_key")
            )
        elif is_dataclass(hints[key]):
            if isinstance(value, dict) or value is None:  # None: all keys of the section are commented out
                passed[key] = _check_section(value or {}, hints[key], f"{place}.", problems)
            else:
                problems.append(
                    UserError(f"{place}: expected a section of keys, found {value!r}", code="config.bad_type")
                )
        elif hints[key] == list[SourceSection]:
            passed[key] = _check_sources(value, place, problems)
        else:
            _check_leaf(schema, key, value, place, problems, passed)
    for name in known:
        if name not in values and known[name].default == MISSING:
            problems.append(UserError(f"missing key {where}{name}", code="config.missing_key"))
    for name, hint in hints.items():
        if is_dataclass(hint) and name not in values:
            _check_section({}, hint, f"{where}{name}.", problems)  # type: ignore[arg-type]
    return passed


def _check_sources(value: Any, place: str, problems: list[UserError]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        problems.append(
            UserError(f"{place}: expected a list of sources, each with kind and path", code="config.bad_type")
        )
        return []
    return [_check_section(item, SourceSection, f"{place}[{i}].", problems) for i, item in enumerate(value)]


def _check_leaf(
    schema: type, key: str, value: Any, place: str, problems: list[UserError], passed: dict[str, Any]
) -> None:
    hint = str(schema.__annotations__[key])
    fits = "bool" in hint or not isinstance(value, bool)  # OmegaConf would read true as 1
    fits = fits and (isinstance(value, list), isinstance(value, dict)) == ("list[" in hint, "dict[" in hint)
    try:
        if fits:
            OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except OmegaConfBaseException:
        fits = False
    if fits and value != MISSING:
        passed[key] = value
    else:
        problems.append(
            UserError(f"{place}: expected {_describe(schema, key)}, found {value!r}", code="config.bad_type")
        )


def _describe(schema: type, key: str) -> str:
    hint = str(schema.__annotations__[key])
    if hint == "Dtype":
        return "one of auto, bfloat16, float16, float32"
    if hint.startswith("Literal["):
        return "one of " + hint.removeprefix("Literal[").rstrip("]").replace('"', "").replace("'", "")
    return hint


def _nearest(key: str, where: str, names: list[str]) -> str:
    """A hint with the nearest valid name: in this section first, then anywhere in the schema."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {where}{close[0]}?)"
    everywhere = {
        name: f"{section.name}.{name}"
        for section in fields(RunConfig)
        for name in (f.name for f in fields(get_type_hints(RunConfig)[section.name]))
    }
    close = difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.75)
    return f" (did you mean {everywhere[close[0]]}?)" if close else f" (valid here: {', '.join(names)})"
