"""A scored run to export, and its merged export."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.run_folder import RunFolder
from tests.helpers.run_examples import copy_run


@pytest.fixture(scope="session")
def scored_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy of the tiny run with the score of its adapter on 6 questions. Copy it before changing anything."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("scored"), evaluation={"max_new_tokens": 12})
    assert main(["evaluate", str(run.path), "--no-base"]) == 0
    return run


@pytest.fixture
def run(scored_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `scored_run` to be changed."""
    return copy_run(scored_run.path, tmp_path)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token or hub of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("HF_TOKEN")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def exported(scored_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of the scored run, by kind. Never write into them."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("merged", "adapter"):
        assert main(["export", str(scored_run.path), "--to", kind, "--output", str(folder / kind)]) == 0
    return {kind: folder / kind for kind in ("merged", "adapter")}
