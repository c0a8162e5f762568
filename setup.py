"""Builds the wheel; everything else about the package is in pyproject.toml.

A wheel also carries what a checkout has beside the package: configs, task YAMLs, the machine's scripts and the demo's data
builder, as finetune/project/; `finetune.runtime.installed` lists and finds them. An editable install copies nothing.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look here

from finetune.runtime.installed import carried_files  # noqa: E402


class BuildWithProject(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in carried_files(ROOT):
            target = Path(self.build_lib, "finetune", "project", path.relative_to(ROOT))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithProject})
