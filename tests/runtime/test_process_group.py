"""What a broken connection to another rank means, by its signs of life."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finetune.errors import EXIT_TRANSIENT, TransientError
from finetune.runtime import process_group
from finetune.runtime.presence import BEAT_SECONDS, PRESENT, SURE_SECONDS, Presence
from tests.helpers.errors import raises
from tests.runtime.test_presence import Clock, Store

BROKEN = RuntimeError("Connection closed by peer")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of rank 0, where rank 1 has given no sign of life for SURE_SECONDS."""
    store, clock = Store(), Clock()
    presence = Presence(store, 0, [1], clock)
    clock.now += SURE_SECONDS
    monkeypatch.setattr(process_group, "_watch", process_group._Watch(store, presence))
    return store


@pytest.mark.usefixtures("store")
def test_a_broken_connection_to_a_silent_rank_is_a_lost_machine() -> None:
    found = process_group.machine_lost(BROKEN)
    assert found and found.exit_code == EXIT_TRANSIENT

    def fails() -> None:
        raise found

    with raises(
        "distributed.machine_lost", match="^process 1, or its machine, is no longer there", kind=TransientError
    ):
        fails()


def test_the_last_sign_of_life_may_be_seen_after_the_connection_has_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = Store(), Clock()
    presence = Presence(store, 0, [1], clock)
    store.set(PRESENT.format(1), "7")  # which rank 0 has not looked at yet

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now - Clock.now > 3 * BEAT_SECONDS:
            presence.beat()  # as the watching thread does, late on a busy machine

    monkeypatch.setattr(process_group, "_watch", process_group._Watch(store, presence))
    monkeypatch.setattr(process_group, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
    assert process_group.machine_lost(BROKEN) is not None


def test_a_rank_that_said_what_is_wrong_is_not_lost(store: Store) -> None:
    store.set(process_group.FAILED, "{}")
    assert process_group.machine_lost(BROKEN) is None


@pytest.mark.usefixtures("store")
def test_an_own_mistake_is_no_lost_machine() -> None:
    assert process_group.machine_lost(ValueError("a bug")) is None


def test_on_a_single_machine_torchrun_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_watch", process_group._Watch(Store()))
    assert process_group.machine_lost(BROKEN) is None
