"""What a sweep varies: KEY=VALUE,VALUE on the command line, with the config's types.

A comma in brackets or quotes does not split a value, so a key that is a list is varied as
`lora.target_modules=[q_proj,v_proj],[q_proj,k_proj]`. One value is an ordinary override of every trial. LOW..HIGH is a range,
from which only a search draws.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.load import examples_per_step, load_config, to_dict
from finetune.config.resume_rules import RULES
from finetune.config.schema import RunConfig
from finetune.errors import UserError, combined, shown

MOST_TRIALS = 100
"""Of one sweep. Each is a run with its own folder, and is trained at least up to the first comparison."""
NOT_COMPARABLE = (
    *("model.name", "model.revision", "model.trust_remote_code", "model.max_seq_length"),
    *("training.objective", "model.cpu_bf16_matmul"),
)
"""With another value the validation loss is one of other tokens, other examples or another kind."""
LOG_FROM = 10.0
"""A range whose ends differ by this factor is drawn from on a logarithmic scale."""
_RANGE = re.compile(r"([-+.0-9eE]+)\.\.([-+.0-9eE]+)")
_CLOSES = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Range:
    """low and high are included. whole: only whole numbers."""

    low: float
    high: float
    whole: bool

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high / self.low >= LOG_FROM


@dataclass(frozen=True)
class Axis:
    """A key that differs between trials. values: as typed, in the order typed; empty for a range."""

    key: str
    values: tuple[str, ...]
    range: Range | None = None

    @property
    def typed(self) -> str:
        if self.range is None:
            return ",".join(self.values)
        return f"{number(self.range.low, self.range.whole)}..{number(self.range.high, self.range.whole)}"


@dataclass(frozen=True)
class Space:
    """fixed: the overrides of every trial. base: the config with them, without those that differ."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    base: RunConfig

    def grid(self) -> list[tuple[str, ...]]:
        """The overrides of every trial, the last key varying fastest. Raises UserError for ranges, and for too many trials."""
        if ranges := [axis.key for axis in self.axes if axis.range]:
            raise UserError(
                f"{', '.join(ranges)}: a range has no grid; list the values, or use --search optuna --trials N",
                code="sweep.range_in_grid",
            )
        count = math.prod(len(axis.values) for axis in self.axes)
        if count > MOST_TRIALS:
            raise UserError(
                f"{count:,} trials: a grid may have up to {MOST_TRIALS}; list fewer values, or use --search optuna --trials N",
                code="sweep.too_many_trials",
            )
        words = [[f"{axis.key}={value}" for value in axis.values] for axis in self.axes]
        return list(itertools.product(*words))


def parse_space(config_file: Path, words: Sequence[str]) -> Space:
    """Raises UserError that lists every key that is unknown or makes no sense in a sweep, and every value of another type, and
    for a sweep in which nothing differs."""
    fixed, axes, problems = list[str](), list[Axis](), list[UserError]()
    for word in words:
        key, sign, text = word.partition("=")
        values = split_values(text)
        span = _range_of(text)
        if not sign or (len(values) == 1 and span is None):
            fixed.append(word)  # a word that is no override is reported with the config's other mistakes
        elif any(axis.key == key for axis in axes):
            problems.append(
                UserError(f"{key}: is given twice; write all its values in one list", code="sweep.bad_space")
            )
        else:
            axes.append(Axis(key, () if span else values, span))
            problems += _faults_of_key(key)
    base = load_config(config_file, fixed)
    if not problems:
        problems = [fault for axis in axes for fault in _faults_of_values(config_file, fixed, axis)]
    if problems:
        raise combined(problems, str(config_file), code="sweep.bad_space")
    if not axes:
        raise UserError(
            "sweep: expected a key with two or more values, such as training.learning_rate=1e-4,2e-4",
            code="sweep.bad_space",
        )
    return Space(tuple(fixed), tuple(axes), base)


def split_values(text: str) -> tuple[str, ...]:
    """The parts between the commas that are not in brackets or quotes."""
    parts, closing = [""], list[str]()
    for letter in text:
        if closing and letter == closing[-1]:
            closing.pop()
        elif closing and closing[-1] in "'\"":
            pass
        elif letter in _CLOSES:
            closing.append(_CLOSES[letter])
        elif letter in "'\"" and not parts[-1]:
            closing.append(letter)
        elif letter == "," and not closing:
            parts.append("")
            continue
        parts[-1] += letter
    return tuple(parts)


def check_trials(config_file: Path, fixed: Sequence[str], trials: Sequence[Sequence[str]]) -> list[RunConfig]:
    """The config of each trial. Raises UserError that names the trials whose values contradict each other."""
    configs, problems = [], []
    for settings in trials:
        try:
            configs.append(load_config(config_file, [*fixed, *settings]))
            examples_per_step(configs[-1].training)
        except UserError as error:
            problems.append(UserError(f"{' '.join(settings)}: {error}", code=error.code))
    if problems:
        raise combined(problems, "sweep", code="sweep.bad_space")
    return configs


def value_at(config: RunConfig, key: str) -> Any:
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value[name]
    return value


def number(value: float, whole: bool) -> str:
    return str(int(value)) if whole else f"{value:g}"


def label(settings: Sequence[str]) -> str:
    """Of a trial, for people: learning_rate=1e-4, r=8."""
    return ", ".join(word.partition("=")[0].rpartition(".")[2] + "=" + word.partition("=")[2] for word in settings)


def _range_of(text: str) -> Range | None:
    match = _RANGE.fullmatch(text)
    if not match:
        return None
    try:
        low, high = float(match[1]), float(match[2])
    except ValueError:
        return None
    return Range(low, high, whole=all(re.fullmatch(r"[-+]?[0-9]+", end) for end in match.groups()))


def _faults_of_key(key: str) -> list[UserError]:
    rule = RULES.get(key)
    why = ""
    if key.startswith("data."):
        why = "the trials would be validated on different data; prepare two data sets and compare two sweeps"
    elif key in NOT_COMPARABLE:
        why = "validation losses with different values cannot be compared; compare two sweeps"
    elif rule is not None and rule.applies:
        why = f"it does not change what a trial learns ({rule.why})"
    return [UserError(f"{key}: cannot be swept: {why}", code="sweep.bad_key")] if why else []


def _faults_of_values(config_file: Path, fixed: Sequence[str], axis: Axis) -> list[UserError]:
    """Each value alone in the config, which knows its type; also of one that is there twice, such as 1e-4 and 0.0001."""
    span = axis.range
    if span is not None and not span.low < span.high < math.inf:
        return [UserError(f"{axis.key}: expected LOW..HIGH, found {shown(axis.typed)}", code="sweep.bad_space")]
    found: dict[str, str] = {}
    for typed in axis.values or [number(end, span.whole) for end in (span.low, span.high)] if span else axis.values:
        try:
            value = repr(value_at(load_config(config_file, [*fixed, f"{axis.key}={typed}"]), axis.key))
        except UserError as error:
            return [error]
        if value in found:
            return [
                UserError(f"{axis.key}: {typed} is the same value as {found[value]}", code="sweep.bad_space"),
            ]
        found[value] = typed
    return []
