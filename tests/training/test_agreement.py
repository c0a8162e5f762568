"""Machines that would not compute the same are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.runtime import distributed
from finetune.training import agreement
from tests.helpers.errors import raises

FIRST: dict[str, Any] = {"data": "a" * 64, "dtype": "bfloat16", "versions": {"torch": "2.13.0", "trl": "1.0"}}
INPUTS: Any = SimpleNamespace(
    data=SimpleNamespace(folder=Path("data/prepared/x"), manifest_hash="a" * 64),
    device=SimpleNamespace(dtype_name="bfloat16"),
)


def check(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "gather_on_rank0", lambda mine: [FIRST, FIRST, FIRST | changes])
    agreement.check_agreement(INPUTS)


def test_the_same_everywhere_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch)


def test_other_data_another_dtype_and_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"data/prepared/x: process 2 has other prepared data .manifest {'b' * 12}. than process 0 .{'a' * 12}."
    with raises("distributed.other_data", match=other):
        check(monkeypatch, data="b" * 64)
    with raises("distributed.other_dtype", match="process 2 computes in float16, process 0 in bfloat16"):
        check(monkeypatch, dtype="float16")
    told = "process 2 has peft 0.1 instead of None, torch 2.12.0 instead of 2.13.0; install the same versions"
    with raises("distributed.other_versions", match=told):
        check(monkeypatch, versions=FIRST["versions"] | {"torch": "2.12.0", "peft": "0.1"})


def test_each_process_says_what_it_has_and_only_the_first_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_on_rank0", lambda mine: told.append(mine))
    agreement.check_agreement(INPUTS)
    assert told[0]["data"] == "a" * 64 and {"torch", "Python", "finetune (commit)"} <= told[0]["versions"].keys()
