"""A run's folder: its layout, its name, and the versions of the code that writes it.

runs/<name>/config.yaml        the resolved config, self-contained
            run.json           the run record: written at the start, at every log, and at the end
            checkpoints/step-N/
            ledger/            the cost of each attempt
            lease/             which attempt is the live one
            adapter/           the trained adapter, tokenizer and prompt.json
            tensorboard/
            eval.json, eval/<model>.jsonl
            eval/predictions-<name>.json, .jsonl    verdicts on somebody else's answers to the same questions
            report.html, report.md, summary.json
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from finetune.config.load import load_config, to_yaml
from finetune.config.schema import RunConfig, TrainingSection
from finetune.errors import UserError
from finetune.run_name import fault_of_name
from finetune.run_record import RunRecord, read_record, write_record
from finetune.runtime.commands import as_command, resume_command
from finetune.runtime.confined import remove_tree
from finetune.runtime.console import one_line
from finetune.runtime.files import as_text, disk_error, write_text

RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors",
    "omegaconf", "sqlglot", "wandb", "tensorboard", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def lease(self) -> Path:
        return self.path / "lease"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def eval_json(self) -> Path:
        return self.path / "eval.json"

    def eval_rows(self, model: str) -> Path:
        return self.path / "eval" / f"{model}.jsonl"

    def eval_predictions(self, name: str) -> Path:
        return self.path / "eval" / f"predictions-{name}.json"

    def config(self) -> RunConfig:
        return load_config(self.config_yaml)

    def record(self) -> RunRecord:
        return read_record(self.run_json)

    def write_record(self, record: RunRecord) -> None:
        write_record(self.run_json, record)


def check_name_is_free(training: TrainingSection) -> None:
    """Raises UserError if `training.run_name` is not a folder name or is taken: early, before minutes of loading."""
    name = training.run_name
    if name is None:
        return
    if fault := fault_of_name(name):
        raise UserError(f"training.run_name: {fault}", code="run.bad_name")
    if os.path.lexists(Path(training.output_dir) / name):
        raise _taken(Path(training.output_dir) / name)


def create_run(
    config: RunConfig, config_file: Path, claim: Callable[[RunFolder], object] = lambda run: None
) -> RunFolder:
    """Create the folder of a new run; an existing folder is never used.

    claim: called for the folder before anything is written there; it raises UserError if another process has the folder too.
    Its name is `training.run_name`, or the config file's name and the next free number. Raises UserError when the named
    folder exists or cannot be created, and UnicodeEncodeError when its path is not valid Unicode.
    """
    check_name_is_free(config.training)
    root = Path(config.training.output_dir)
    name = config.training.run_name
    if name is None and (fault := fault_of_name(f"{config_file.stem}-001")):
        raise UserError(
            f"{one_line(as_text(config_file))}: a run cannot be named after it: {fault}; set training.run_name",
            code="run.bad_name",
        )
    # otherwise saving the tokenizer would fail after the whole training
    str((root / (name or config_file.stem)).absolute()).encode()
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(_claim(root / name) if name else _claim_numbered(root, config_file.stem))
    except OSError as error:
        raise disk_error(error, root) from error
    claim(folder)
    try:
        write_text(folder.config_yaml, f"# {as_command('finetune', 'train', as_text(config_file))}\n{to_yaml(config)}")
    except BaseException:
        remove_tree(folder.path, inside=root)
        raise
    return folder


def open_run(path: Path) -> RunFolder:
    """The folder of an earlier run. Raises UserError when it is not a run folder."""
    folder = RunFolder(path)
    if not folder.config_yaml.is_file():
        found = sorted(p.parent.name for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        there = f"; runs there: {', '.join(found)}" if found else ""
        raise UserError(f"{path}: not a run folder (no config.yaml in it){there}", code="run.not_found")
    return folder


def remove_not_started(run: RunFolder) -> None:
    """Remove the folder of a run that was killed between creating the folder and writing its first record. Raises UserError
    where the folder holds anything else."""
    if not run.path.is_dir() or run.run_json.exists():
        return
    for path in run.path.rglob("*"):
        ours = path.name == run.config_yaml.name or run.lease in (path, path.parent)
        if not ours and not (path.name.startswith(".") and path.suffix == ".tmp"):
            raise UserError(
                f"{run.path}: holds files, but no run.json; choose another name for the run", code="run.name_taken"
            )
    remove_tree(run.path, inside=run.path.parent)


def _claim(path: Path) -> Path:
    try:
        path.mkdir()
    except FileExistsError:  # another process created it first
        raise _taken(path) from None
    return path


def _taken(path: Path) -> UserError:
    return UserError(
        f"{path}: already exists, and a run is never overwritten; continue it with `{resume_command(path)}`, "
        f"or choose another training.run_name",
        code="run.name_taken",
    )


def _claim_numbered(root: Path, stem: str) -> Path:
    number = 1 + max(
        (int(m[1]) for p in root.iterdir() if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", p.name))), default=0
    )
    while True:
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir()  # fails when another process created it first: then take the next number
            return path
        except FileExistsError:
            number += 1


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state() -> tuple[str | None, bool]:
    """Commit of the running code, and whether tracked files differ from it; (None, False) outside a checkout."""
    here = Path(__file__).resolve().parent
    commit = _git(here, "rev-parse", "HEAD")
    return commit, bool(commit and _git(here, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can affect a run's results."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
