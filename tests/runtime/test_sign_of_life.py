"""A long wait is told on stderr, a short one is not."""

from __future__ import annotations

import threading

from finetune.runtime.sign_of_life import sign_of_life


def test_a_long_wait_is_told_until_it_is_over() -> None:
    said: list[str] = []
    twice = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            twice.set()

    with sign_of_life("answering", every=0.01, say=say):
        assert twice.wait(10)
    told = len(said)
    assert all(line.startswith("answering, for ") for line in said)
    assert not any(thread.name == "sign of life" for thread in threading.enumerate()) and len(said) == told


def test_a_short_one_is_not() -> None:
    said: list[str] = []
    with sign_of_life("answering", say=said.append):
        pass
    assert said == []
