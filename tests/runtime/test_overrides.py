"""OVERRIDES as one text, in a task and back."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.job.settings import read_settings
from finetune.runtime.overrides import joined_overrides, split_overrides
from finetune.stage_end.following import after_plain_plan, after_prepare
from tests.helpers.errors import raises
from tests.helpers.next_commands import typed

SOURCES = "data.sources=[{kind: spider, path: ../spider, files: [train_spider.json]}]"


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)))
def test_whatever_is_joined_is_split_again(values: list[str]) -> None:
    words = [f"lora.r={value}" for value in values]
    assert split_overrides(joined_overrides(words)) == words


def test_plain_words_are_as_they_always_were() -> None:
    text = "training.num_train_epochs=1  lora.r=8 model.name=org/name-7B data.path=~/a"
    assert split_overrides(text) == text.split() and split_overrides("") == []
    assert joined_overrides(["lora.r=8", "model.name=org/name"]) == "lora.r=8 model.name=org/name"


def test_a_job_gets_a_value_with_spaces_whole() -> None:
    settings = read_settings({"CONFIG": "a.yaml", "OVERRIDES": joined_overrides([SOURCES, "lora.r=8"])})
    assert settings.overrides == [SOURCES, "lora.r=8"]


def test_a_quote_that_is_not_closed() -> None:
    with raises("config.bad_overrides", match="^OVERRIDES: .*No closing quotation.*quotes around"):
        split_overrides("lora.r=8 'data.x=a b")


def test_a_value_whose_quotes_are_missing() -> None:
    with raises("config.bad_overrides", match="^OVERRIDES: .*spider.*: not KEY=VALUE; .*quotes around"):
        split_overrides(f"lora.r=8 {SOURCES}")


def test_what_is_needed_to_prepare_alone_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tokenizer").mkdir()
    Path("sky").mkdir()
    Path("sky/train_cheapest.yaml").write_text("envs:\n  CONFIG: run.yaml\n")
    alone = ["model.name=tokenizer", "model.revision=null"]
    train, plan = typed(after_prepare(Path("run.yaml"), [SOURCES, *alone, "lora.r=8"], on_gpu_only=True))
    assert plan == f"finetune plan run.yaml {shlex.quote(SOURCES)} lora.r=8" and "model.name" in train
    Path("tokenizer/model.safetensors").touch()
    assert (
        typed(after_prepare(Path("run.yaml"), alone, on_gpu_only=True))[1]
        == f"finetune plan run.yaml {' '.join(alone)}"
    )
    [launch] = after_plain_plan(Path("run.yaml"), [SOURCES])
    assert split_overrides(launch.words[-1].removeprefix("OVERRIDES=")) == [SOURCES]
