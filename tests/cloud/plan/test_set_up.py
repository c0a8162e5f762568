"""The minutes of set-up that `finetune plan` counts: the median of the user's own launches, else assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.cloud.gcloud.cli import Answer
from finetune.cloud.gcloud.config import Login
from finetune.cloud.plan import set_up
from finetune.cloud.plan.set_up import set_up_minutes
from finetune.cloud.plan.table import render, to_json
from finetune.errors import UserError
from finetune.machine.set_up import EVENT, SetUp
from tests.helpers.plan_examples import ALL, plan_of, priced, row_of, run_config

MODEL = "mistralai/Mistral-7B-v0.1"
OBJECT = "gs://finetune-p-me/set-up/mistralai-mistral-7b-v0-1-cf2a46fe.jsonl"


@pytest.fixture(autouse=True)
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nobody is logged in, and nothing is cached; returns what gcloud is asked."""

    def nobody() -> Login:
        raise UserError("nobody", code="gcloud.not_logged_in")

    asked: list[str] = []
    monkeypatch.setattr(set_up, "local_login", nobody)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def log_in(monkeypatch: pytest.MonkeyPatch, asked: list[str], answer: Answer) -> None:
    def ask(question: tuple[str, ...], *words: str, seconds: float) -> Answer:
        asked.append(" ".join([*question, *words]))
        return answer

    monkeypatch.setattr(set_up, "local_login", lambda: Login("p", "me@example.com"))
    monkeypatch.setattr(set_up, "ask", ask)


def launch(minutes: float, at: str, *, warm: bool = True, model: str = MODEL) -> SetUp:
    source = "bucket" if warm else "hub"
    facts = {"packages_from": "bucket", "model_from": source, "model": model, "at": at}
    return SetUp({"boot": 60.0, "weights": 60 * minutes - 60}, facts)


def put(runs: Path, *launches: SetUp) -> None:
    """Each launch as an attempt of a run of its own."""
    for number, one in enumerate(launches, len(list(runs.glob("*")))):
        log = Ledger(runs / f"run-{number:03d}" / "ledger").new_attempt(1, machine={}, price=None, resumed_step=None)
        log.begin(100.0)
        log.note(EVENT, **one.for_ledger())
        log.end(900.0, "done", 3)


def config(runs: Path, **plan: Any) -> Any:
    return run_config(training={"output_dir": str(runs)}, plan=plan)


def test_without_a_launch_it_is_assumed(tmp_path: Path) -> None:
    found = set_up_minutes(config(tmp_path / "runs"), ask_google=True)
    assert (found.minutes, found.basis) == (12.0, f"assumed: no launch of {MODEL} is recorded here")


def test_the_median_of_warm_launches_if_there_are_any(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    put(runs, launch(11.0, "2026-11-01", warm=False))
    found = set_up_minutes(config(runs), ask_google=False)
    assert (found.minutes, found.basis) == (
        11.0, "measured: median of your last 1 launch with a bucket that lacked packages or weights"
    )  # fmt: skip
    put(runs, *(launch(minutes, f"2026-11-0{day}") for day, minutes in enumerate([4.0, 9.0, 5.0], 2)))
    put(runs, launch(11.5, "2026-11-06", warm=False), launch(1.0, "2026-11-07", model="some/other"))
    found = set_up_minutes(config(runs), ask_google=False)
    assert (found.minutes, found.basis) == (5.0, "measured: median of your last 3 launches with a warm bucket")


def test_only_the_newest_launches_count(tmp_path: Path) -> None:
    put(tmp_path, *(launch(20.0, f"2026-10-{day:02d}") for day in range(1, 30)))
    put(tmp_path, *(launch(4.0, f"2026-11-{day:02d}") for day in range(1, 11)))
    assert set_up_minutes(config(tmp_path), ask_google=False).minutes == 4.0


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    put(tmp_path, launch(4.0, "2026-11-01"))
    found = set_up_minutes(config(tmp_path, setup_minutes=7.5), ask_google=False)
    assert (found.minutes, found.basis) == (7.5, "plan.setup_minutes")
    assert set_up_minutes(config(tmp_path, setup_minutes=0.0), ask_google=False).minutes == 0.0


def test_launches_that_only_the_bucket_knows(
    tmp_path: Path, google: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [launch(4.0, "2026-11-01"), launch(6.0, "2026-11-02"), launch(9.0, "2026-11-03", model="some/other")]
    lines = [json.dumps(one.for_ledger()) for one in known]
    log_in(monkeypatch, google, Answer("\n".join([*lines, "torn {", "[]"])))
    put(tmp_path / "runs", known[0])  # a copy of a run, which is not counted twice
    assert set_up_minutes(config(tmp_path / "runs"), ask_google=False).minutes == 4.0, "a launch asks nobody"
    assert google == []
    assert set_up_minutes(config(tmp_path / "runs"), ask_google=True).minutes == 5.0
    assert google == [f"storage cat {OBJECT}"]
    assert set_up_minutes(config(tmp_path / "runs"), ask_google=True).minutes == 5.0
    assert set_up_minutes(config(tmp_path / "runs"), ask_google=False).minutes == 5.0, "the policy counts as plan does"
    assert len(google) == 1, "a copy is used for ten minutes"


def test_without_an_answer_it_is_not_asked_again_at_once(
    tmp_path: Path, google: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, google, Answer("", "not found", "..."))
    for _ in range(2):
        assert set_up_minutes(config(tmp_path), ask_google=True).minutes == 12.0
    assert len(google) == 1


def test_the_plan_counts_it_and_says_where_it_comes_from(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    before = plan_of(config(runs), priced(tmp_path, **ALL))
    put(runs, launch(4.2, "2026-11-01"), launch(4.2, "2026-11-02"))
    after = plan_of(config(runs), priced(tmp_path, **ALL))
    for name in ALL:
        one, other = (row_of(plan, name, spot=False).cost for plan in (before, after))
        assert one and other and one.hours - other.hours == pytest.approx((12 - 4.2) / 60)
    text = render(after, "c.yaml")
    assert "with 4.2 min of boot and set-up (measured: median of your last 2 launches with a warm bucket);" in text
    assert to_json(after)["set_up"] == {
        "minutes": pytest.approx(4.2), "basis": "measured: median of your last 2 launches with a warm bucket"
    }  # fmt: skip
    assert to_json(after)["assumptions"]["setup_minutes"] == pytest.approx(4.2)
