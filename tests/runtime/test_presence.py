"""Signs of life of the machines of a run, by one clock, and the interface by which they reach each other."""

from __future__ import annotations

import socket

import pytest

from finetune.runtime.network import interface_towards
from finetune.runtime.presence import BEAT_SECONDS, LOST_SECONDS, VARIABLE, Presence, lost_seconds
from tests.helpers.errors import raises


class Store:
    """In memory; `get` of a missing key would wait."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_rank_that_stops_counting_is_silent(clock: Clock) -> None:
    store = Store()
    first, one, two = (Presence(store, rank, [1, 2] if rank == 0 else [], clock) for rank in range(3))
    for _ in range(10):
        for each in (one, two, first):
            each.beat()
        clock.now += BEAT_SECONDS
    assert first.silent(LOST_SECONDS) is None
    since = clock.now
    while clock.now - since < LOST_SECONDS - 2 * BEAT_SECONDS:
        one.beat()
        first.beat()
        clock.now += BEAT_SECONDS
        assert first.silent(LOST_SECONDS) is None
    assert first.silent(10.0) == 2
    clock.now += 2 * BEAT_SECONDS
    one.beat()
    first.beat()
    assert first.silent(LOST_SECONDS) == 2
    two.beat()  # it was only paused
    clock.now += BEAT_SECONDS
    first.beat()
    assert first.silent(LOST_SECONDS) is None


def test_one_that_never_gave_a_sign_is_silent_since_the_beginning(clock: Clock) -> None:
    first = Presence(Store(), 0, [1], clock)
    first.beat()
    assert first.silent(LOST_SECONDS) is None
    clock.now += LOST_SECONDS
    first.beat()
    assert first.silent(LOST_SECONDS) == 1


def test_other_ranks_look_for_nobody(clock: Clock) -> None:
    other = Presence(Store(), 1, [], clock)
    clock.now += 10 * LOST_SECONDS
    other.beat()
    assert other.silent(0.0) is None


def test_the_seconds_can_be_set_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_seconds() == LOST_SECONDS
    monkeypatch.setenv(VARIABLE, "7.5")
    assert lost_seconds() == 7.5
    for text in ("4", "601", "nan", "soon"):
        monkeypatch.setenv(VARIABLE, text)
        with raises("distributed.bad_lost_seconds", match=f"expected seconds from 5 to 600, found '{text}'"):
            lost_seconds()


def test_this_machine_reaches_itself_by_its_loopback() -> None:
    names = [name for _, name in socket.if_nameindex()]
    found = interface_towards("127.0.0.1")
    assert found in names and found.startswith("lo")
    assert interface_towards("no-such-host.invalid") is None
