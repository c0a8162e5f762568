"""--search optuna: settings from the losses of earlier trials, the same ones after a kill."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.sweep.folder import Result, Trial
from finetune.sweep.open import Wanted, open_sweep
from finetune.sweep.search import Seen, suggest
from finetune.sweep.space import Axis, Range
from tests.helpers.errors import raises

ConfigWriter = Callable[..., Path]
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")
AXES = (Axis("training.learning_rate", (), Range(1e-5, 1e-1, False)), Axis("lora.r", ("2", "4", "8")))


def loss(settings: tuple[str, ...]) -> float:
    """Lowest at 1e-3, and for r=4."""
    rate, r = (word.partition("=")[2] for word in settings)
    return abs(math.log10(float(rate)) + 3) + (r != "4")


def searched(count: int, seed: int = 0) -> list[tuple[str, ...]]:
    seen: list[Seen] = []
    for number in range(count):
        settings = suggest(AXES, seen, seed + number)
        seen.append(Seen(settings, loss(settings), ended=True))
    return [one.settings for one in seen]


@needs_optuna
def test_it_learns_from_the_losses() -> None:
    found = searched(40)
    first, last = ([loss(settings) for settings in part] for part in (found[:10], found[30:]))
    assert sum(last) / 10 < sum(first) / 10 / 2 and min(map(loss, found)) < 0.3


@needs_optuna
def test_it_begins_anew_for_each_trial_and_is_the_same() -> None:
    assert searched(6) == searched(6) and searched(6) != searched(6, seed=1)


@needs_optuna
def test_values_are_of_the_space() -> None:
    for settings in searched(15):
        rate, r = (word.partition("=")[2] for word in settings)
        assert 1e-5 <= float(rate) <= 1e-1 and r in ("2", "4", "8")
    whole = (Axis("lora.r", (), Range(4, 64, True)),)
    assert all(4 <= int(suggest(whole, [], seed)[0].partition("=")[2]) <= 64 for seed in range(10))


@needs_optuna
def test_a_small_space_has_no_trial_twice() -> None:
    axes, seen = (Axis("lora.r", ("2", "4", "8")),), list[Seen]()
    for number in range(3):
        seen.append(Seen(suggest(axes, seen, number), float(number), ended=True))
    assert len({one.settings for one in seen}) == 3
    assert suggest(axes, seen, 9)[0] in {f"lora.r={r}" for r in (2, 4, 8)}, "then it repeats one"


@needs_optuna
def test_trials_without_a_loss_are_no_obstacle() -> None:
    seen = [
        Seen(("training.learning_rate=1e-3", "lora.r=2"), None, True),
        Seen(("training.learning_rate=1e-2", "lora.r=4"), None, False),
    ]
    assert len(suggest(AXES, seen, 0)) == 2


@needs_optuna
def test_a_sweep_asks_it_for_what_its_files_say(tiny_config: ConfigWriter) -> None:
    config = tiny_config(training={"eval_steps": 1, "max_steps": 8})
    wanted = Wanted(config, ["training.learning_rate=1e-5..1e-1", "lora.r=2,4,8"], search="optuna", trials=6, seed=5)
    opened = open_sweep(wanted)
    opened.create()
    settings = opened.settings_of(0)
    opened.folder.add_trial(Trial(0, "tiny-sweep-t00", list(settings)))
    opened.folder.add_result(Result(0, 0, 2, loss(settings), ""))
    assert opened.settings_of(1) == suggest(AXES, [Seen(settings, loss(settings), True)], 6)
    assert open_sweep(wanted).settings_of(1) == opened.settings_of(1)


def test_without_optuna_it_says_how_to_get_it(tiny_config: ConfigWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises("sweep.no_optuna"):
        open_sweep(Wanted(tiny_config(training={"eval_steps": 1}), ["lora.r=2,4"], search="optuna", trials=2))
