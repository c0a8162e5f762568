"""What a sweep varies, as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.resume_rules import RULES
from finetune.sweep.open import Wanted, open_sweep
from finetune.sweep.rungs import check_validated, rungs_of, steps_of
from finetune.sweep.space import (
    MOST_TRIALS,
    NOT_COMPARABLE,
    Range,
    check_trials,
    label,
    parse_space,
    split_values,
    value_at,
)
from tests.helpers.errors import raises

ConfigWriter = Callable[..., Path]
BATCH = {"effective_batch_size": 5, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": None}


@pytest.fixture
def config(tiny_config: ConfigWriter) -> Path:
    return tiny_config(training={"eval_steps": 2, "max_steps": 40})


def test_the_last_key_varies_fastest(config: Path) -> None:
    space = parse_space(config, ["training.learning_rate=1e-4,2e-4", "lora.r=8,16,32", "training.seed=3"])
    assert space.fixed == ("training.seed=3",) and space.base.training.seed == 3
    assert [" ".join(settings) for settings in space.grid()] == [
        f"training.learning_rate={rate} lora.r={r}" for rate in ("1e-4", "2e-4") for r in (8, 16, 32)
    ]
    configs = check_trials(config, space.fixed, space.grid())
    assert {(one.training.learning_rate, one.lora.r) for one in configs} == {
        (rate, r) for rate in (1e-4, 2e-4) for r in (8, 16, 32)
    }
    assert label(space.grid()[0]) == "learning_rate=1e-4, r=8"


def test_a_list_is_one_value(config: Path) -> None:
    space = parse_space(config, ["lora.target_modules=[q_proj,v_proj],[q_proj,k_proj]", "plan.gpus=[L4,T4]"])
    trials = check_trials(config, space.fixed, space.grid())
    assert [one.lora.target_modules for one in trials] == [["q_proj", "v_proj"], ["q_proj", "k_proj"]]
    assert space.base.plan.gpus == ["L4", "T4"], "one list is one value"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("8,16", ("8", "16")),
        ("8", ("8",)),
        ("", ("",)),
        ("8,", ("8", "")),
        ("[a,b],[c]", ("[a,b]", "[c]")),
        ("'a,b',c", ("'a,b'", "c")),
        ("{a: [1,2]},x", ("{a: [1,2]}", "x")),
        ("it's,b", ("it's", "b")),
    ],
)
def test_split_values(text: str, parts: tuple[str, ...]) -> None:
    assert split_values(text) == parts


@given(st.text(alphabet="ab,[]{}'\" "))
def test_splitting_loses_nothing(text: str) -> None:
    assert ",".join(split_values(text)) == text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["lora.rank=8,16"], "config.unknown_key"),
        (["lora.r=8,much"], "config.bad_type"),
        (["lora.r=8,-1"], "config.bad_value"),
        (["lora.r=8,"], "config.bad_type"),
        (["lora.target_modules=q_proj,v_proj"], "config.bad_type"),
        (["lora.r=8,8"], "sweep.bad_space"),
        (["training.learning_rate=1e-4,0.0001"], "sweep.bad_space"),
        (["lora.r=8,16", "lora.r=32,64"], "sweep.bad_space"),
        (["lora.r=8"], "sweep.bad_space"),
        ([], "sweep.bad_space"),
        (["lora.r=64..8"], "sweep.bad_space"),
        (["budget.max_hours=1,2"], "sweep.bad_key"),
        (["tracking.wandb=offline,disabled"], "sweep.bad_key"),
        (["data.val_fraction=0.1,0.2"], "sweep.bad_key"),
        (["model.name=a,b"], "sweep.bad_key"),
        (["nonsense,more"], "config.bad_override"),
    ],
)
def test_what_makes_no_sense_is_refused(config: Path, words: list[str], code: str) -> None:
    with raises(code):
        parse_space(config, words).grid()


def test_every_mistake_is_named_at_once(config: Path) -> None:
    with raises("sweep.bad_key", match=r"budget.max_hours: cannot be swept.*data.seed: cannot be swept"):
        parse_space(config, ["budget.max_hours=1,2", "data.seed=1,2"])


def test_values_that_contradict_each_other_name_their_trial(config: Path) -> None:
    words = ["training.per_device_train_batch_size=1,2", "training.effective_batch_size=4,6", "lora.r=2,4"]
    with raises("config.conflicting_values", match="per_device_train_batch_size=2 training.effective_batch_size="):
        space = parse_space(config, ["training.gradient_accumulation_steps=4", *words])
        check_trials(config, space.fixed, space.grid())


def test_a_grid_is_bounded(config: Path) -> None:
    many = ",".join(map(str, range(1, 1001)))
    words = [f"training.seed={many}", f"lora.lora_alpha={many}"]
    with raises("sweep.too_many_trials", match=r"1,000,000 trials: a grid may have up to 100"):
        parse_space(config, words).grid()
    with raises("sweep.too_many_trials"):
        open_sweep(Wanted(config, ["lora.r=2..4"], search="optuna", trials=MOST_TRIALS + 1))


def test_ranges(config: Path) -> None:
    space = parse_space(config, ["training.learning_rate=1e-5..1e-3", "lora.r=4..8"])
    assert [axis.range for axis in space.axes] == [Range(1e-5, 1e-3, False), Range(4, 8, True)]
    assert [axis.range.is_log for axis in space.axes if axis.range] == [True, False]
    assert [axis.typed for axis in space.axes] == ["1e-05..0.001", "4..8"]
    with raises("sweep.range_in_grid", match="training.learning_rate, lora.r"):
        space.grid()


def test_every_key_that_can_be_swept_has_a_rule() -> None:
    assert set(NOT_COMPARABLE) <= set(RULES)


def test_a_value_of_a_config(config: Path) -> None:
    assert value_at(parse_space(config, ["lora.r=2,4"]).base, "training.max_steps") == 40


# rungs


def test_rungs_are_at_the_steps_of_the_shortest_trial(config: Path) -> None:
    opened = open_sweep(Wanted(config, ["training.max_steps=40,80", "lora.r=2,4"]))
    assert (opened.steps, list(opened.sweep.rungs)) == (40, [10, 20])
    assert list(open_sweep(Wanted(config, ["lora.r=2,4"], rungs=5)).sweep.rungs) == [20], (
        "two trials have one comparison"
    )
    assert list(open_sweep(Wanted(config, ["lora.r=2,4"], rungs=0)).sweep.rungs) == []


def test_steps_from_the_prepared_data(tiny_config: ConfigWriter) -> None:
    config = tiny_config(training={"eval_steps": 1, "max_steps": -1, "num_train_epochs": 2.5, **BATCH})
    base = open_sweep(Wanted(config, ["lora.r=2,4"])).base
    assert steps_of(base) == 13, "24 examples are 5 steps, and two and a half times that"
    assert rungs_of([base], 2, 1) == (6,)


def test_without_a_validation_loss_there_is_no_sweep(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    with raises("sweep.no_validation", match="training.eval_steps"):
        open_sweep(Wanted(tiny_config(training={"eval_steps": 0}), ["lora.r=2,4"]))
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text('{"counts": {"train": 9, "val": 0}}')
    base = open_sweep(Wanted(tiny_config(training={"eval_steps": 1}), ["lora.r=2,4"])).base
    base.data.output_dir = str(prepared)
    with raises("sweep.no_validation", match="has no validation records"):
        check_validated(base)


def test_data_that_are_prepared_with_other_settings(tiny_config: ConfigWriter) -> None:
    with raises("data.other_settings", match="data.max_train_records null, this config has 4"):
        open_sweep(Wanted(tiny_config(training={"eval_steps": 1}), ["lora.r=2,4", "data.max_train_records=4"]))


def test_data_that_are_not_prepared(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    with raises("file.missing"):
        open_sweep(
            Wanted(tiny_config(training={"eval_steps": 1}), ["lora.r=2,4", f"data.output_dir={tmp_path / 'no'}"])
        )


@pytest.mark.parametrize("name", ["a/b", "", ".x", "predictions", "sweeps", "x" * 91])
def test_a_name_that_no_sweep_can_have(config: Path, name: str) -> None:
    if name:
        with raises("sweep.bad_name"):
            open_sweep(Wanted(config, ["lora.r=2,4"], name=name))
