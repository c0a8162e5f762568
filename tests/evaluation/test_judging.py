"""Judging in a pool of processes: the same verdicts as one after the other, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation import judge_pool, judge_process
from finetune.evaluation import judging as judging_module
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge_pool import ENDED_TWICE, JudgePool
from finetune.evaluation.judging import Judging, judged_rows, judging
from finetune.evaluation.score import score
from finetune.machine.hardware import usable_cores
from finetune.sql.text import is_select
from tests.helpers.data_examples import make_database
from tests.helpers.errors import raises
from tests.helpers.judged_questions import Questions, answers, of_shop, official_cases, timeless

ROOT = Path(__file__).resolve().parents[2]
GOLDS = [f"SELECT name FROM item WHERE id = {number % 5}" for number in range(40)]
SLOW = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 90000000) SELECT COUNT(*) FROM n"
"""Takes longer than any test waits for it."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("shop"), items=6)


@pytest.fixture
def shop(database: Path) -> Questions:
    return of_shop(database, GOLDS)


def pool_of(judged: Judging) -> JudgePool:
    assert judged._pool is not None
    return judged._pool


def until(met: Callable[[], Any], seconds: float = 60.0) -> Any:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := met():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def busy_pid(judged: Judging) -> int:
    """The process that judges the only answer there is."""
    pool = pool_of(judged)

    def only_one() -> list[int]:  # at first another one may be at work on a gold query
        busy = [lane.process.pid for lane in pool._lanes if lane.busy and lane.process]
        found = [pid for pid in busy if children(pid)]
        return found if len(found) == 1 else []

    [pid] = until(only_one)
    return int(pid)


# the same verdicts


def test_the_pool_agrees_with_the_public_evaluators_on_800_predictions_and_with_judging_one_by_one() -> None:
    questions, given, cases = official_cases()
    rows = judged_rows(questions, given, workers=2)
    assert timeless(rows) == timeless(judged_rows(questions, given, workers=0))
    official = {
        "test_suite": "ts_keep_distinct",
        "test_suite_no_distinct": "ts_default",
        "bird_set": "bird_set",
        "strict": "strict_no_column_permutation",
    }
    for rule, verdict in official.items():
        wrong = [
            row.id
            for row, case in zip(rows, cases, strict=True)
            if is_select(case["pred"]) and (row.verdicts[rule] == "correct") != bool(case[verdict])
        ]  # where prose or a fence stands around the query, the evaluators run all of it
        assert wrong == [], rule
    classes = score(rows)["error_classes"]
    assert sum(classes.values()) == sum(row.verdict != "correct" for row in rows) and "unknown" not in classes
    assert {"column_of_another_table", "no_such_column", "wrong_rows", "wrong_columns"} <= set(classes)


def test_rows_come_in_the_order_of_the_questions_by_key_and_beside_other_work(shop: Questions) -> None:
    right, wrong = answers(GOLDS), answers(["SELECT 1"] * len(GOLDS))
    with judging(shop, workers=2) as judged:
        for number in reversed(range(len(GOLDS))):
            judged.submit("right", number, right[number])
            judged.submit(("sample", 1), number, wrong[number])
        judged.submit("right", 3, right[3])  # known already
        with pytest.raises(ValueError, match="two answers to question 3"):
            judged.submit("right", 3, wrong[3])
        pool = pool_of(judged)
        until(lambda: pool.outcome("right", 0) and pool.outcome(("sample", 1), 39))  # without asking for rows
        rows = judged.rows("right")
        assert [row.id for row in rows] == [record.id for record in shop.records]
        assert {row.verdict for row in rows} == {"correct"}
        assert {row.verdict for row in judged.rows(("sample", 1))} == {"wrong_rows"}
        judged.submit("retry", 7, right[7])
        assert [row.id for row in judged.rows("retry")] == ["r7"] and judged.rows("nothing") == []
        assert judged.speed("right").answers == 40 and judged.speed("right").seconds > 0
        assert judged.speed("nothing").per_second is None


def test_hostile_sql_is_confined_in_the_pool_as_it_is_alone(database: Path) -> None:
    hostile = [
        "ATTACH '/tmp/x' AS y", "DELETE FROM item", "SELECT load_extension('x')", "PRAGMA table_info(item)",
        "SELECT printf('%.*c', 500000000, 'x')", "SELECT 1; SELECT 2", "\0", "SELECT '\ud800'",
    ]  # fmt: skip
    questions = of_shop(database, ["SELECT name FROM item"] * len(hostile), timeout_seconds=30.0)
    rows = judged_rows(questions, answers(hostile), workers=2)
    assert timeless(rows) == timeless(judged_rows(questions, answers(hostile), workers=0))
    assert [row.verdict for row in rows[:4]] == ["forbidden", "forbidden", "forbidden", "forbidden"]


def test_a_database_that_cannot_be_read_is_the_users_error(shop: Questions, tmp_path: Path) -> None:
    shop.databases[5] = tmp_path / "gone.sqlite"
    with raises("sql.database_missing", match=r"gone\.sqlite"):
        judged_rows(shop, answers(GOLDS), workers=2)


# processes that end


def test_a_process_that_is_killed_is_replaced_and_its_answers_are_judged_again(database: Path) -> None:
    questions = of_shop(database, [*GOLDS, "SELECT 1"], timeout_seconds=3.0)
    with judging(questions, workers=1) as judged:
        for number, answer in enumerate(answers(GOLDS)):
            judged.submit("a", number, answer)
        pool = pool_of(judged)
        until(lambda: pool.outcome("a", 0))
        os.kill(pool.pids[0], signal.SIGKILL)
        assert {row.verdict for row in judged.rows("a")} == {"correct"}


def test_an_answer_at_which_two_processes_end_has_a_verdict_that_says_so(database: Path) -> None:
    questions = of_shop(database, ["SELECT 1", "SELECT 2"], timeout_seconds=300.0)
    with judging(questions, workers=1) as judged:
        judged.submit("a", 0, Answer(SLOW, 3))
        first = busy_pid(judged)
        judged.submit("a", 1, Answer("SELECT 2", 3))
        os.kill(first, signal.SIGKILL)
        second = until(lambda: (pid := busy_pid(judged)) != first and pid)
        os.kill(second, signal.SIGKILL)
        slow, other = judged.rows("a")
    assert (slow.verdict, slow.error_class, other.verdict) == ("crashed", "crashed", "correct")
    assert slow.error == f"{ENDED_TWICE} (killed by signal 9, perhaps for want of memory)"
    assert set(slow.verdicts.values()) == {"crashed"}


def test_processes_that_keep_ending_are_an_error_of_the_machine(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_pool, "DEATHS_IN_A_ROW", 1)
    with raises("evaluation.judging_failed", match="signal 9"), judging(
        of_shop(database, ["SELECT 1"], timeout_seconds=300.0), workers=1
    ) as judged:  # fmt: skip
        judged.submit("a", 0, Answer(SLOW, 3))
        os.kill(busy_pid(judged), signal.SIGKILL)
        judged.rows("a")


def test_a_process_that_is_stopped_is_replaced(shop: Questions) -> None:
    with judging(shop, workers=1) as judged:
        pool = pool_of(judged)
        judged.submit("a", 0, answers(GOLDS)[0])
        until(lambda: pool.outcome("a", 0) and pool.ready)  # gold queries ahead of answers have run, too
        assert pool._lanes[0].process is not None
        pool._lanes[0].process._stalled = 1.0
        os.kill(pool.pids[0], signal.SIGSTOP)
        judged.submit("a", 1, answers(GOLDS)[1])
        assert [row.verdict for row in judged.rows("a")] == ["correct", "correct"]


def test_without_processes_the_answers_are_judged_here(
    shop: Questions, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_process, "START", "raise SystemExit(3)")
    rows = judged_rows(shop, answers(GOLDS), workers=2)
    assert {row.verdict for row in rows} == {"correct"}
    assert "a process for it does not start: exit status 3" in capfd.readouterr().err


# a busy machine


def test_a_time_limit_that_was_hit_under_load_is_tried_once_more_alone(database: Path) -> None:
    questions = of_shop(database, GOLDS[:3], timeout_seconds=1.0)
    with judging(questions, workers=1) as judged:
        judged.submit("a", 0, answers(GOLDS)[0])
        pool = pool_of(judged)
        until(lambda: pool.outcome("a", 0) and pool.ready)  # gold queries ahead of answers have run, too
        [sandbox] = children(pool.pids[0])
        os.kill(sandbox, signal.SIGSTOP)  # as if it got no turn on the CPU
        judged.submit("a", 1, Answer(GOLDS[1].replace("id = 1", "id = 0 + 1"), 3))
        outcome = until(lambda: pool.outcome("a", 1))
        assert outcome.verdict == "timeout", "it did hit the limit"
        judged.submit("a", 2, Answer(SLOW, 3))
        rows = judged.rows("a")
    assert [row.verdict for row in rows] == ["correct", "correct", "timeout"]


def test_beside_a_model_on_the_cpu_one_process_judges_with_low_priority(shop: Questions) -> None:
    with judging(shop, beside_cpu=True, few=1) as judged:
        pool = pool_of(judged)
        judged.submit("a", 0, answers(GOLDS)[0])
        until(lambda: pool.outcome("a", 0))
        [pid] = pool.pids
        here = os.getpriority(os.PRIO_PROCESS, 0)
        assert {os.getpriority(os.PRIO_PROCESS, each) for each in (pid, *children(pid))} == {min(19, here + 10)}
        judged.nothing_else_runs()
        assert pool.workers == max(1, min(judging_module.MOST_WORKERS, usable_cores()))
        for number, answer in enumerate(answers(GOLDS)):
            judged.submit("a", number, answer)
        assert {row.verdict for row in judged.rows("a")} == {"correct"}
    with judging(shop) as judged:
        assert judged._pool is None, "few questions start no processes"


def test_one_that_is_held_up_leaves_its_work_to_others(database: Path) -> None:
    golds = ["SELECT 1"] * 12
    questions = of_shop(database, golds, timeout_seconds=300.0)
    with judging(questions, workers=2) as judged:
        judged.submit("a", 0, Answer(SLOW, 3))
        busy_pid(judged)
        for number in range(1, 12):  # the same gold query, hence the same process
            judged.submit("a", number, Answer("SELECT 1", 3))
        pool = pool_of(judged)

        def all_but_the_slow_one() -> bool:
            with pool._changed:
                pool._changed.notify_all()
            return all(pool.outcome("a", number) for number in range(1, 12))

        until(all_but_the_slow_one, seconds=100)
        raise_soon = time.monotonic()
        judged._answers["a"].pop(0)
        pool.close(at_once=True)
        judged._pool = None
    assert time.monotonic() - raise_soon < 30


# the end


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path


def test_an_interruption_ends_the_processes_and_leaves_nothing(database: Path, temporary: Path) -> None:
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt), judging(
        of_shop(database, ["SELECT 1"], timeout_seconds=300.0), workers=2
    ) as judged:  # fmt: skip
        judged.submit("a", 0, Answer(SLOW, 3))
        pid = busy_pid(judged)
        pids = [*pool_of(judged).pids, *children(pid)]
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20 and len(pids) >= 2
    until(lambda: not any(map(runs, pids)), seconds=10)
    assert list(temporary.iterdir()) == []


def test_the_processes_end_with_their_parent(database: Path) -> None:
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judging import judging
from tests.helpers.judged_questions import of_shop
from tests.evaluation.test_judging import SLOW, busy_pid, children, pool_of
with judging(of_shop(Path({str(database)!r}), ["SELECT 1"], timeout_seconds=300.0), workers=2) as judged:
    judged.submit("a", 0, Answer(SLOW, 3))
    pid = busy_pid(judged)
    print(*pool_of(judged).pids, *children(pid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    pids = list(map(int, done.stdout.split()))
    assert done.returncode == -signal.SIGKILL and len(pids) >= 2
    until(lambda: not any(map(runs, pids)), seconds=10)
