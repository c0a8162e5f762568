"""vLLM answers in a process of its own: the worker is the real one, vLLM a stand-in (tests/helpers/fake_vllm)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.hf import HfGenerator
from finetune.evaluation.generators.vllm import VllmGenerator
from finetune.run_folder import RunFolder
from tests.helpers.fake_vllm.install import fake_vllm
from tests.helpers.run_examples import copy_run

PROMPTS = ["How many items?", "Which item has number 3?", "List the names of all items dearer than 12. " * 4, "a"]


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs the stand-in; call it to make it fail. What it was asked is in tmp_path/seen.jsonl."""
    fake_vllm(tmp_path / "site", monkeypatch)

    def fail(**faults: Any) -> None:
        monkeypatch.setenv("FAKE_VLLM", json.dumps({"seen": str(tmp_path / "seen.jsonl"), **faults}))

    fail()
    return fail


@pytest.fixture
def seen(faults: Callable[..., None], tmp_path: Path) -> Callable[[str], list[Any]]:
    def of(key: str) -> list[Any]:
        path = tmp_path / "seen.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        return [line for line in lines if key in line]

    return of


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return copy_run(tiny_run, tmp_path / "runs", evaluation={"dequantize": True})


@pytest.fixture
def config(run: RunFolder) -> RunConfig:
    return run.config()


def ask(model: Any, prompts: list[str] = PROMPTS, *, tuned: bool = False, most: int = 8, **more: Any) -> list[Answer]:
    answers: list[Answer] = model.answers(
        prompts, tuned=tuned, batch_size=4, max_new_tokens=most, progress=False, **more
    )
    return answers


def test_base_and_tuned_answers_are_those_of_hf(config: RunConfig, run: RunFolder, seen: Callable[..., Any]) -> None:
    theirs = HfGenerator().load(config, run.adapter)
    ours = VllmGenerator().load(config, run.adapter)
    for tuned in (False, True, False):
        assert ask(ours, tuned=tuned) == ask(theirs, tuned=tuned)
    assert ask(theirs, tuned=True) != ask(theirs)
    assert len(seen("loaded")) == 1, "the engine was loaded more than once"
    assert len(seen("reloaded")) == len(seen("reset")) == 2
