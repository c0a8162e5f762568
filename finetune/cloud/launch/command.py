"""What `finetune launch` types for the user: SkyPilot's own command, in the folder whose .sky.yaml names the launch policy.

SkyPilot reads that file only from the folder in which its command is typed, so the same command typed elsewhere is not held to
`max_hourly_cost` as a whole price, nor to a budget.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.cloud.gcloud.policy_setting import FOLDER_SETTINGS, KEY, POLICY, names_policy
from finetune.cloud.launch.task_file import (
    DEFAULT_CEILING_USD,
    DEFAULT_RUN_USD,
    Alternative,
    alternatives,
    stray,
    values,
    variables,
    with_absolute_paths,
)
from finetune.errors import UserError
from finetune.machine.price import Ceilings, parse_limit
from finetune.runtime.commands import as_command
from finetune.runtime.files import read_text
from finetune.runtime.installed import in_checkout, install_command, project_files
from finetune.runtime.yaml_file import load_yaml

FLAGS = {
    *(
        "-y",
        "--yes",
        "-d",
        "--detach-run",
        "-no-d",
        "--async",
        "--no-async",
        "--use-spot",
        "--no-use-spot",
        "--no-job-group",
    ),
    *("--dryrun", "--down", "-r", "--retry-until-up", "--fast", "--no-setup", "--docker", "--resize"),
}
"""Options of SkyPilot's launch commands (0.14) without a value."""


@dataclass(frozen=True)
class Launch:
    """folder: in which SkyPilot's command is to run. words: the command. task: as our_job.py reads one. environment: its
    variables (`envs`), with those of --env-file and --env. alternatives: the GPU machines that it may take, as far as they can be
    told."""

    folder: Path
    words: list[str]
    task: SimpleNamespace
    environment: dict[str, str]
    alternatives: list[Alternative]
    usd_per_hour: float | None
    workdir: Path

    @property
    def config(self) -> Path | None:
        """The config that the task trains with; None if it names none, or one that is not here."""
        named = self.environment.get("CONFIG")
        found = self.folder / self.workdir / named if named else None
        return found if found and found.is_file() else None

    @property
    def cluster(self) -> str | None:
        """The name that was typed for it."""
        named = values(self.words, "-c", "--cluster")
        return named[-1] if named else None

    @property
    def ceilings(self) -> Ceilings:
        """With the launch policy's defaults where the task has none. Raises UserError for a variable that is not a number."""
        run_usd, hours = (self._limit(name) for name in ("MAX_RUN_USD", "MAX_HOURS"))
        default_usd = DEFAULT_RUN_USD if "run_usd" in self.defaults else None
        return Ceilings(usd_per_hour=self._usd_per_hour, run_usd=run_usd or default_usd, hours=hours)

    @property
    def defaults(self) -> set[str]:
        """Which ceilings the task does not set, so that the policy sets them, for a GPU on Google Cloud."""
        unset = {"usd_per_hour": any(one.usd_per_hour is None for one in self.alternatives)}
        unset["run_usd"] = bool(self.alternatives) and "MAX_RUN_USD" not in self.environment
        return {name for name, is_unset in unset.items() if is_unset}

    @property
    def _usd_per_hour(self) -> float | None:
        each = [DEFAULT_CEILING_USD if one.usd_per_hour is None else one.usd_per_hour for one in self.alternatives]
        return max(each, default=self.usd_per_hour)

    def _limit(self, name: str) -> float | None:
        text = self.environment.get(name)
        if not text:
            return None
        found = parse_limit(text)
        if found is None:
            raise UserError(f"{name}: expected a positive number, such as 25, found {text!r}", code="launch.bad_limit")
        return float(found)


def launch_of(task: Path, options: Sequence[str], *, managed: bool) -> Launch:
    """options: SkyPilot's, as typed. managed: `sky jobs launch`. Raises UserError if the task cannot be read, if no folder above
    it names the policy, or if SkyPilot is not installed in this environment."""
    program = shutil.which("sky", path=sysconfig.get_path("scripts"))
    if program is None:
        raise UserError(
            f"SkyPilot is not installed in this environment; run `{install_command('cloud')}`",
            code="launch.no_skypilot",
        )
    content = _read(task)
    _check_words(options)
    folder = _folder_of(task)
    options = with_absolute_paths(options)
    words = [program, *(["jobs"] if managed else []), "launch", str(task.resolve().relative_to(folder)), *options]
    resources = content.get("resources")
    ceiling = resources.get("max_hourly_cost") if isinstance(resources, dict) else None
    workdir = [*(path for path in [content.get("workdir")] if isinstance(path, str)), *values(options, "--workdir")]
    environment, place = variables(content, options), workdir[-1] if workdir else "."
    return Launch(
        folder,
        words,
        SimpleNamespace(run=content.get("run"), envs=environment, num_nodes=content.get("num_nodes"), workdir=place),
        environment,
        alternatives(content, options),
        float(ceiling) if isinstance(ceiling, int | float) else None,
        Path(place).expanduser(),
    )


def _read(task: Path) -> dict[str, Any]:
    try:
        content = load_yaml(read_text(task))
    except FileNotFoundError:
        ours = "sky/" if in_checkout() else project_files() / "sky"
        raise UserError(f"{task}: no such task file; see {ours} for ours", code="launch.no_task") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "expected one YAML document"
        raise UserError(f"{task}: not readable as a task of SkyPilot ({why})", code="launch.bad_task") from None
    if not isinstance(content, dict):
        raise UserError(f"{task}: expected one task of SkyPilot, found no keys in it", code="launch.bad_task")
    if content.keys() & {"model", "training", "lora"} and "run" not in content:
        raise UserError(
            f"{task}: is the config of a run, not a task of SkyPilot; name a task, such as "
            f"`{as_command('finetune', 'launch', 'sky/train_cheapest.yaml', '--env', f'CONFIG={task}')}`",
            code="launch.bad_task",
        )
    return content


def _check_words(options: Sequence[str]) -> None:
    for before, word in pairwise(["", *options]):
        if word.startswith("-") or (before.startswith("-") and before not in FLAGS and "=" not in before):
            continue
        raise stray(word)


def _folder_of(task: Path) -> Path:
    """The nearest folder above the task whose .sky.yaml names our policy."""
    for folder in task.resolve().parents:
        if names_policy(folder):
            return folder
    raise UserError(
        f"{task}: no folder above it has a {FOLDER_SETTINGS} with `{KEY}: {POLICY}`, so no ceiling would hold; launch a task of "
        "this project's sky/",
        code="launch.no_policy",
    )
