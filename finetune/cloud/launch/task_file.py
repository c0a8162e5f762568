"""What a task YAML asks for, with the options that are typed beside it, as far as it can be said without SkyPilot, whose import
takes seconds. The launch policy decides on SkyPilot's own objects (sky_resources.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.cloud.catalog.machine_types import OWN_MACHINES
from finetune.errors import UserError
from finetune.machine.gpus import GPUS, machine_name
from finetune.runtime.commands import env_option
from finetune.runtime.overrides import joined_overrides

DEFAULT_CEILING_USD = 5.0
"""Ceiling of a task without max_hourly_cost, in US dollars per hour for all its machines; above that of every task in sky/."""
DEFAULT_RUN_USD = 25.0
"""Budget of a task without MAX_RUN_USD, in US dollars."""
PATHS = ("--env-file", "--secret-file", "--workdir", "--config")
"""Options of SkyPilot's launch commands (0.14) whose value is a path; that of --config may be KEY=VALUE."""

KEY_VALUE = re.compile(r"[a-z_]+\.[a-z_.]+=")


def stray(words: str) -> UserError:
    """What stands beside a task and is no option: SkyPilot takes it for a part of a shell command, and launches a machine of its
    own choice for it."""
    separate = words.split()
    overrides = separate if all("=" in word for word in separate) else [words]
    how = f"type `{env_option('OVERRIDES', joined_overrides(overrides))}`" if KEY_VALUE.match(words) else "leave it out"
    return UserError(f"{words}: beside a task SkyPilot takes options only; {how}", code="launch.stray_word")


def refuse_task_as_command(run: object) -> None:
    """run: what SkyPilot would run on the machine. Raises UserError if that is a task's file with more words beside it."""
    task, _, words = run.partition(" ") if isinstance(run, str) else ("", "", "")
    if words and Path(task).suffix in (".yaml", ".yml") and Path(task).is_file():
        raise stray(words)


@dataclass(frozen=True)
class Alternative:
    """One machine that a task may take. name: as in `plan.gpus`. usd_per_hour: its max_hourly_cost, None without a number."""

    name: str
    spot: bool
    usd_per_hour: float | None


def values(options: Sequence[str], *names: str) -> list[str]:
    """What was typed for an option, as `--name value` or `--name=value`."""
    found = [following for word, following in pairwise(options) if word in names]
    return found + [word.partition("=")[2] for word in options if word.partition("=")[0] in names and "=" in word]


def with_absolute_paths(options: Sequence[str]) -> list[str]:
    """The options as they are to be typed in another folder. A path that begins with ~ is left to the program."""
    words = list(options)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in PATHS and equals:
            words[place] = f"{name}={_absolute(name, value)}"
        elif place and words[place - 1] in PATHS:
            words[place] = _absolute(words[place - 1], word)
    return words


def _absolute(option: str, value: str) -> str:
    if not value or value.startswith("~") or (option == "--config" and not Path(value).is_file()):
        return value
    return str(Path(value).absolute())


def variables(content: Mapping[str, Any], options: Sequence[str]) -> dict[str, str]:
    """The environment of the job: `envs` of the task, then --env-file, then --env, as SkyPilot merges them."""
    given = content.get("envs")
    found = {str(key): str(value) for key, value in given.items()} if isinstance(given, dict) else {}
    for file in values(options, "--env-file")[-1:]:
        found |= _of_dotenv(file)
    for typed in values(options, "--env"):
        name, equals, value = typed.partition("=")
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return found


def _of_dotenv(file: str) -> dict[str, str]:
    """With SkyPilot's own reader. Nothing of a file that cannot be read, which SkyPilot reports."""
    from dotenv import dotenv_values  # a requirement of SkyPilot

    with suppress(OSError, ValueError):
        return {name: value for name, value in dotenv_values(file).items() if value is not None}
    return {}


def alternatives(content: Mapping[str, Any], options: Sequence[str]) -> list[Alternative]:
    """The GPU machines of Google Cloud that the task may take; none if one of them cannot be told, or is elsewhere."""
    resources = content.get("resources")
    common = resources if isinstance(resources, dict) else {}
    entries = common.get("ordered") or common.get("any_of") or [{}]
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        asked = common | (entry if isinstance(entry, dict) else {}) | _typed(options)
        names = [machine_name(*gpus) for gpus in _gpus(asked)]
        cloud = str(asked.get("infra") or asked.get("cloud") or "gcp").partition("/")[0].lower()
        if not names or cloud not in ("gcp", "*"):
            return []
        ceiling = asked.get("max_hourly_cost")
        usd_per_hour = float(ceiling) if isinstance(ceiling, int | float) else None
        found += [Alternative(name, asked.get("use_spot") is True, usd_per_hour) for name in names]
    return found


def _typed(options: Sequence[str]) -> dict[str, Any]:
    """The resources that options set for all machines of the task."""
    names = {"accelerators": ("--gpus",), "instance_type": ("-t", "--instance-type"), "infra": ("--infra", "--cloud")}
    found: dict[str, Any] = {key: typed[-1] for key, options_ in names.items() if (typed := values(options, *options_))}
    kinds = [word for word in options if word in ("--use-spot", "--no-use-spot")]
    return found | ({"use_spot": kinds[-1] == "--use-spot"} if kinds else {})


def _gpus(asked: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(GPU, count) of each of `accelerators`, which is L4, L4:1, {L4: 1} or several of these; else those of the machine type."""
    given = asked.get("accelerators")
    if not given:
        machine = asked.get("instance_type")
        yield from (
            (gpu, count) for gpu, counts in OWN_MACHINES.items() for count, types in counts.items() if machine in types
        )
        return
    ours = {name.lower(): name for name in GPUS}
    pairs = (
        given.items() if isinstance(given, dict) else [text.partition(":")[::2] for text in map(str, _several(given))]
    )
    for name, count in pairs:
        with suppress(TypeError, ValueError):
            yield ours.get(str(name).strip().lower(), str(name).strip()), int(count or 1)


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | set | tuple) else [given]
