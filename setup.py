"""Builds the wheel; everything else about the package is in pyproject.toml.

A wheel also carries what a checkout has beside the package: configs, task YAMLs, the machine's scripts and the demo's data
builder, as finetune/project/; `finetune.runtime.installed` finds them in both. An editable install copies nothing.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
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


class BuildWithProject(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in CARRIED:
            for path in sorted(_files(ROOT / name)):
                target = Path(self.build_lib, "finetune", "project", path.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]


setup(cmdclass={"build_py": BuildWithProject})
