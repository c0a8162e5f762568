"""Writes the plan's order into a task YAML; comments and all other lines stay as they are."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.cloud.plan.plan import Plan, Row
from finetune.errors import EXIT_TRANSIENT, UserError
from finetune.machine.gpus import MACHINES
from finetune.machine.price import Ceilings
from finetune.runtime.files import read_bytes, write_text
from finetune.runtime.yaml_file import load_yaml

LISTS = ("ordered", "any_of")
REPLACED = {"accelerators", "instance_type", "use_spot"}
"""The keys that a replaceable entry may have; any other, such as a region, was set by the user and would be lost."""


def write_order(plan: Plan, task: Path, command: str) -> None:
    """Replace the `ordered:` or `any_of:` list under `resources:` of a task YAML with the plan's order.

    command: what the user typed, for the comment. Raises UserError, and writes nothing, if the plan refuses every machine, the
    file has no such list, or an entry of the list has more keys than REPLACED.
    """
    chosen = [row for row in plan.rows if row.chosen]
    if not chosen:
        raise UserError(
            f"{task}: not written, because the plan refuses every machine: see the table", code="plan.all_refused"
        )
    text, before = _read(task)
    key, first, last = _place_of_list(task, text)
    _check_entries(task, key.value, before["resources"][key.value])
    lines = text.splitlines(keepends=True)
    end = "\r\n" if lines[first].endswith("\r\n") else "\n"
    order = _ordered(chosen, command, " " * key.start_mark.column, end)
    written = "".join(lines[:first]) + order + "".join(lines[last:])
    if not _same_but_for_lists(written, before):
        raise UserError(
            f"{task}: the layout of the list under resources: cannot be replaced automatically; edit it by hand",
            code="plan.unwritable_task",
        )
    write_text(task, written)


@dataclass(frozen=True)
class TaskSettings:
    """What a task says. ceilings: None where it says nothing that is a number. evaluate: its EVALUATE, "" without one. trusts:
    whether it takes prices with an anomaly. recovers: whether a managed job of it goes on after our exit code 75."""

    ceilings: Ceilings
    evaluate: str
    trusts: bool
    recovers: bool

    def variables_for(self, wanted: Ceilings, *, scored: bool, trusts: bool) -> list[str]:
        """NAME=VALUE of what a launch has to be told besides, to keep to these ceilings and to do what was planned."""
        given = (
            ("MAX_RUN_USD", wanted.run_usd, self.ceilings.run_usd),
            ("MAX_HOURS", wanted.hours, self.ceilings.hours),
        )
        changed = [f"{name}={value:.10g}" for name, value, of_task in given if value is not None and value != of_task]
        if scored != (self.evaluate == "1"):
            changed.append(f"EVALUATE={scored:d}")
        return [*changed, *["FINETUNE_TRUST_PRICES=1"] * (trusts and not self.trusts)]


def settings_of(task: Path) -> TaskSettings:
    """Raises UserError if it is no task."""
    _, content = _read(task)
    envs: Any = content.get("envs")
    envs = envs if isinstance(envs, dict) else {}
    ceilings = Ceilings(
        usd_per_hour=_positive(content["resources"].get("max_hourly_cost")),
        run_usd=_positive(envs.get("MAX_RUN_USD")),
        hours=_positive(envs.get("MAX_HOURS")),
    )
    recovery = content["resources"].get("job_recovery")
    codes = recovery.get("recover_on_exit_codes") if isinstance(recovery, dict) else None
    recovers = EXIT_TRANSIENT in (codes if isinstance(codes, list) else [codes])
    evaluate, trusts = (str(envs.get(name, "")) for name in ("EVALUATE", "FINETUNE_TRUST_PRICES"))
    return TaskSettings(ceilings, evaluate, trusts == "1", recovers)


def _positive(value: Any) -> float | None:
    with suppress(TypeError, ValueError):
        number = float(value)
        return number if 0 < number < math.inf else None
    return None


def _read(task: Path) -> tuple[str, dict[str, Any]]:
    """The text with its line ends unchanged, and its parsed content."""
    try:
        text = read_bytes(task).decode("utf-8")
        content = load_yaml(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{task}: not a readable task YAML ({' '.join(str(error).split())})", code="plan.unwritable_task"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("resources"), dict):
        raise UserError(f"{task}: expected a SkyPilot task with a section `resources:`", code="plan.unwritable_task")
    return text, content


def _place_of_list(task: Path, text: str) -> tuple[yaml.ScalarNode, int, int]:
    """The list's key, its first line and the line after its last entry, counted from 0."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    assert document is not None  # `_read` found a section in it
    resources = [value for key, value in document.value if key.value == "resources"]
    found = [(key, value) for section in resources for key, value in section.value if key.value in LISTS]
    if len(resources) != 1 or len(found) != 1:
        raise UserError(
            f"{task}: expected one list `ordered:` or `any_of:` under one `resources:`, to replace it with the order",
            code="plan.unwritable_task",
        )
    key, last = found[0]  # the last leaf, because the end mark of a block is the start of the next key
    while isinstance(last, yaml.CollectionNode) and not last.flow_style:
        last = last.value[-1] if isinstance(last, yaml.SequenceNode) else last.value[-1][1]
    return key, key.start_mark.line, last.end_mark.line + 1


def _check_entries(task: Path, name: str, entries: Any) -> None:
    for entry in entries if isinstance(entries, list) else []:
        if more := sorted(set(entry) - REPLACED if isinstance(entry, dict) else [str(entry)]):
            raise UserError(
                f"{task}: an entry of {name}: has more keys than a machine needs ({', '.join(more)}), which would be lost; "
                f"put them under resources: itself, or edit the list by hand",
                code="plan.unwritable_task",
            )


def _same_but_for_lists(written: str, before: dict[str, Any]) -> bool:
    try:
        after = load_yaml(written)
    except ValueError:
        return False
    if not isinstance(after, dict) or not isinstance(after.get("resources"), dict):
        return False
    return "ordered" in after["resources"] and _without_lists(after) == _without_lists(before)


def _without_lists(task: dict[str, Any]) -> dict[str, Any]:
    resources = {key: value for key, value in task["resources"].items() if key not in LISTS}
    return {**task, "resources": resources}


def _ordered(chosen: list[Row], command: str, indent: str, end: str) -> str:
    lines = [f"{indent}ordered:  # by dollars for the run, estimated: {command}"]
    for row in chosen:
        assert row.cost is not None and row.offer is not None  # a row without a price is never chosen
        machine = MACHINES[row.on_gpu.name]
        spot = str(row.spot).lower()
        entry = f"{{accelerators: {machine.accelerators}, instance_type: {machine.machine}, use_spot: {spot}}}"
        lines.append(f"{indent}  - {entry}  # ${row.cost.usd:.2f}, {row.cost.hours:.1f} h")
    return end.join([*lines, ""])
