"""What answers cost: measured seconds and tokens, dollars where the price is known, and the dollars of a gained point."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.config.schema import BudgetSection
from finetune.errors import UserError
from finetune.evaluation import cost
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.cost import attempts_path, cost_of, evaluation_price, noting, training_usd, usd_per_point
from finetune.evaluation.generators.base import Answer, Done
from finetune.evaluation.generators.registry import GENERATORS
from finetune.evaluation.run import evaluate_run
from finetune.machine.price import MachinePrice
from tests.helpers.dict_generator import DictGenerator
from tests.helpers.run_examples import copy_run

PROMPTS = ["a", "b", "c", "d"]


class Clock:
    """Of time.monotonic: it moves only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def loading(self, seconds: float, model: Any) -> Any:
        self.now += seconds
        return model


class Slow:
    """A model that takes 10 seconds for each answer of 5 tokens."""

    dtype_name = "words"

    def __init__(self, clock: Clock, stop_before: int | None = None, within: float = 0.0) -> None:
        """within: seconds that it loads only once it is asked."""
        self._clock, self._stop, self._within = clock, stop_before, within
        self.load_seconds = 0.0

    def answers(self, prompts: Sequence[str], *, done: Done, **_: Any) -> list[Answer]:
        self._clock.now += self._within
        self.load_seconds += self._within
        for number in range(len(prompts)):
            if number == self._stop:
                raise KeyboardInterrupt
            self._clock.now += 10
            done(number, Answer("SELECT 1", 5))
        return [Answer("SELECT 1", 5)] * len(prompts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ask(
    path: Path,
    clock: Clock,
    usd_per_hour: float | None,
    *,
    loading: float = 30.0,
    stop_before: int | None = None,
    within: float = 0.0,
) -> AnswerFile:
    file = AnswerFile(path, "tuned model", {"model": "m"}, PROMPTS, 2)
    file.read()
    price = None if usd_per_hour is None else MachinePrice(usd_per_hour, f"catalog at {usd_per_hour:g}")
    model: Any = Slow(clock, stop_before, within)
    load = noting(file, lambda: clock.loading(loading, model), lambda: price, lambda: clock.now)
    file.generate(load, tuned=True, max_new_tokens=9, progress=False)
    return file


def test_seconds_are_without_loading_and_dollars_with_it(tmp_path: Path, clock: Clock) -> None:
    assert cost_of([ask(tmp_path / "a.jsonl", clock, 36.0)]).as_dict() == {
        "seconds": 40.0, "loading_seconds": 30.0, "new_tokens": 20, "new_tokens_per_second": 0.5,
        "usd": pytest.approx(0.7), "usd_basis": "catalog at 36",
    }  # fmt: skip


def test_each_attempt_is_priced_by_the_machine_that_it_ran_on(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(path, clock, 36.0, stop_before=3)
    clock.now += 5000  # nobody pays for the time between
    found = cost_of([ask(path, clock, 72.0, loading=20.0)])
    assert found.usd == pytest.approx((30 + 30) * 0.01 + (20 + 10) * 0.02)
    assert (found.seconds, found.loading_seconds, found.basis) == (40.0, 50.0, "catalog at 36 and catalog at 72")


def test_what_is_loaded_only_when_it_is_asked_is_loading_and_is_paid(tmp_path: Path, clock: Clock) -> None:
    """As vLLM does it."""
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(path, clock, 36.0, stop_before=1, within=100.0)
    found = cost_of([ask(path, clock, 72.0, within=50.0)])
    assert (found.seconds, found.loading_seconds) == (40.0, 30 + 100 + 30 + 50)
    assert found.usd == pytest.approx((30 + 100 + 10) * 0.01 + (30 + 50 + 30) * 0.02)


def test_answers_that_are_only_read_keep_the_dollars_of_those_who_generated_them(tmp_path: Path, clock: Clock) -> None:
    first = cost_of([ask(tmp_path / "a.jsonl", clock, 36.0)])
    again = ask(
        tmp_path / "a.jsonl", clock, None
    )  # complete: no model is loaded, and this machine's price plays no part
    assert cost_of([again]) == first


@pytest.mark.parametrize(
    "damage",
    [
        "",  # no file, as beside answers of an earlier version
        "{torn",
        '{"seconds_before": 0, "loading_seconds": 1, "usd_per_hour": null, "basis": null}\n',
        '{"seconds_before": 0, "loading_seconds": 1, "usd_per_hour": NaN, "basis": "x"}\n',
        '{"seconds_before": 0, "loading_seconds": 1, "usd_per_hour": -3, "basis": "x"}\n',
        '{"seconds_before": 0, "loading_seconds": 1, "usd_per_hour": 1e9, "basis": "x"}\n',
        '{"seconds_before": "NaN", "loading_seconds": 1, "usd_per_hour": 3, "basis": "x"}\n',
        '{"seconds_before": 20, "loading_seconds": 1, "usd_per_hour": 3, "basis": "x"}\n',  # the first attempt is missing
        '[]\n"text"\n7\n',
        "\xff\xfe",
    ],
)
def test_dollars_are_unknown_where_an_attempt_is_damaged_or_has_no_price(
    tmp_path: Path, clock: Clock, damage: str
) -> None:
    file = ask(tmp_path / "a.jsonl", clock, 36.0)
    attempts_path(file.path).unlink()
    if damage:
        attempts_path(file.path).write_bytes(damage.encode("latin-1"))
    found = cost_of([file])
    assert (found.usd, found.seconds, found.new_tokens) == (None, 40.0, 20)


def test_answers_that_start_over_start_their_attempts_over(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "a.jsonl"
    ask(path, clock, 36.0)
    path.unlink()
    assert cost_of([ask(path, clock, 72.0)]).usd == pytest.approx(70 * 0.02)


def test_a_disk_that_is_full_is_reported(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"a\.attempts\.jsonl: no space left on the disk"):
        ask(tmp_path / "a.jsonl", clock, 36.0)


# prices, and the dollars of a point


def test_the_price_is_that_of_the_launch_else_that_of_the_config(
    monkeypatch: pytest.MonkeyPatch, no_keys: None
) -> None:
    assert evaluation_price(BudgetSection()) is None
    assert evaluation_price(BudgetSection(usd_per_hour=2.5)) == MachinePrice(2.5, "budget.usd_per_hour of the config")
    monkeypatch.setattr(cost, "machine_price", lambda: MachinePrice(3.67, "catalog of 2026-11-29"))
    assert evaluation_price(BudgetSection(usd_per_hour=2.5)) == MachinePrice(3.67, "catalog of 2026-11-29")


def test_a_price_table_that_cannot_be_read_is_named_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, no_keys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_PRICES", "{")
    assert evaluation_price(BudgetSection(usd_per_hour=2.5)) is None
    assert "the dollars of this evaluation are unknown: FINETUNE_PRICES" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "evaluation", "points", "expected"),
    [
        (9.0, 1.0, 20.0, 0.5), (0.0, 1.0, 4.0, 0.25), (9.0, 1.0, 0.0, None), (9.0, 1.0, -3.0, None),
        (None, 1.0, 20.0, None), (9.0, None, 20.0, None), (9.0, 1.0, None, None),
    ],
)  # fmt: skip
def test_dollars_a_point(
    training: float | None, evaluation: float | None, points: float | None, expected: float | None
) -> None:
    assert usd_per_point(training, evaluation, points) == expected


def test_training_dollars_are_those_of_all_attempts_or_unknown(tmp_path: Path) -> None:
    assert training_usd(tmp_path / "none") is None
    ledger = Ledger(tmp_path)
    for number, price in ((1, MachinePrice(36.0, "catalog")), (2, MachinePrice(72.0, "catalog"))):
        log = ledger.new_attempt(number, machine={}, price=price, resumed_step=None)
        log.begin(0.0)
        log.end(50.0, "done", 4)
    assert training_usd(tmp_path) == pytest.approx(1.5)
    log = ledger.new_attempt(3, machine={}, price=None, resumed_step=None)
    log.begin(0.0)
    assert training_usd(tmp_path) is None, "part of the sum would look like all of it"


def test_eval_json_has_the_cost_of_each_model_and_of_a_point(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_keys: None
) -> None:
    """At a dollar a second, as the config of the tiny run has it."""
    from finetune.data.prepared import load_prepared
    from finetune.data.prompts import PromptTemplate

    run = copy_run(tiny_run, tmp_path / "runs")
    gold = {PromptTemplate().render_record(r): r.sql for r in load_prepared(tiny_data, progress=False).records("test")}
    monkeypatch.setitem(GENERATORS, "dict", DictGenerator({}, gold))
    result = evaluate_run(run, generator="dict", progress=False)
    models, whole = result["models"], result["cost"]
    assert whole["points_gained"] == 100.0
    training = Ledger(run.ledger).account().usd
    assert training is not None and whole["training_usd"] == pytest.approx(training, abs=1e-5) and training > 0
    each = [models[name]["cost"] for name in ("base", "tuned")]
    assert whole["usd"] == pytest.approx(sum(one["usd"] for one in each), abs=1e-5)
    assert whole["usd_per_point"] == pytest.approx((training + whole["usd"]) / 100, abs=1e-5)
    assert [one["usd_basis"] for one in each] == ["budget.usd_per_hour of the config"] * 2
    assert result["leaks"] == {"data_of_training": True, "removed": 0, "same_shape": 6, "questions": 6}
    assert json.loads(run.eval_json.read_text()) == json.loads(json.dumps(result))
    assert (
        "usd_per_point" in result["cost"]
        and evaluate_run(run, base=False, generator="dict", progress=False)["cost"]["usd_per_point"] is None
    ), "without the base model there is no gain"
