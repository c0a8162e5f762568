"""Copies of a finished run, to be changed, and a data set that can be prepared anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from finetune.run_folder import RunFolder
from tests.helpers.data_examples import jsonl_source, make_database, row, run_prepare, write_jsonl


def copy_run(run: Path, root: Path, **sections: dict[str, Any]) -> RunFolder:
    """A copy in the folder `root`, which becomes its training.output_dir, with some values of its config changed."""
    copy = RunFolder(Path(shutil.copytree(run, root / run.name, ignore=shutil.ignore_patterns("checkpoints"))))
    values = yaml.safe_load(copy.config_yaml.read_text(encoding="utf-8"))
    for section, changes in {"training": {"output_dir": str(root)}, **sections}.items():
        values[section] |= changes
    copy.config_yaml.write_text(yaml.safe_dump(values), encoding="utf-8")
    return copy


def prepare_shop(folder: Path, *, items: int = 3, databases: bool = True, **changes: Any) -> Path:
    """folder/prepared with two train, one val and two test records, replaced if it is there; `changes` to all records."""
    records = [row(n, split=split, **changes) for n, split in enumerate(["train", "train", "val", "test", "test"])]
    shutil.rmtree(folder / "databases", ignore_errors=True)
    make_database(folder / "databases", items=items)
    settings = {"databases": str(folder / "databases")} if databases else {}
    run_prepare([jsonl_source(write_jsonl(folder / "records.jsonl", records), **settings)], folder / "prepared")
    return folder / "prepared"
