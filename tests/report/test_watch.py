"""`finetune watch`: what it says of a run, and the live view in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.budget.attempts import Work
from finetune.budget.ledger import Ledger
from finetune.cli.main import main
from finetune.machine.price import MachinePrice
from finetune.report.watch import as_json, bar, curve, lines, look
from tests.helpers.errors import reported
from tests.helpers.report_fixtures import build_run, change, spending

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = build_run(tmp_path / "runs/mine", questions=40)
    (run / "config.yaml").touch()
    return run


def said(run: Path, now: float | None = None) -> dict[str, str]:
    return dict(lines(look(run, time.time() if now is None else now)))


def test_a_run_in_training(run: Path) -> None:
    (run / "eval.json").unlink()
    record = json.loads((run / "run.json").read_text())
    gpu = {"name": "NVIDIA L4", "memory_gib": 22.0, "count": 1}
    change(
        run / "run.json", status="running", steps={"done": 60, "planned": 240}, tokens={"trained": 60_000},
        tokens_per_second=500.0, hardware=record["hardware"] | {"gpu": gpu}, memory={"measured_peak_gib": 18.25},
        spending=spending()["spending"] | {"ceiling_hours": 9.0},
    )  # fmt: skip
    shown = said(run)
    assert shown["status"].startswith("running, last heard of 0 s ago")
    assert "60 of 240" in shown["steps"] and shown["steps"].count("█") == 5
    assert "6.0 min left (estimated)" in shown["steps"], "180 steps of 1,000 tokens at 500 tokens/s"
    last = [row["loss"] for row in record["history"] if "loss" in row][-1]
    assert f"{last:.3f}, from" in shown["loss"]
    assert "from" in shown["validation"]
    assert shown["speed"] == "500 tokens/s (measured)"
    assert shown["memory"] == "18.2 of 22.0 GiB at the peak, NVIDIA L4 (measured)"
    assert (
        "of $10.00, $11.27 at the end (estimated): it will stop at the ceiling (measured seconds x" in shown["dollars"]
    )
    assert "of 9.00 h (measured)" in shown["hours"]
    assert "score" not in shown


def test_attempts_and_dollars_come_from_the_ledger(run: Path) -> None:
    for number, (seconds, reason) in enumerate([(7200.0, "preempted"), (3600.0, None)], 1):
        log = Ledger(run / "ledger").new_attempt(
            number, machine={"gpu": "L4", "spot": True, "zone": "us-east4-a"}, price=MachinePrice(0.4, "catalog"), resumed_step=0
        )  # fmt: skip
        log.begin(0.0)
        log.heartbeat(seconds, 10 * number)
        if reason:
            log.end(seconds, reason, 10 * number)
    shown = said(run)
    assert shown["dollars"].startswith("$1.20")
    assert shown["attempt 1"] == "L4 spot us-east4-a, $0.400/h, 2.0 h, to step 10: preempted"
    assert shown["attempt 2"].endswith("to step 20: ended without notice")
    assert shown["attempts"] == "2, 1 ended without notice"
    change(run / "run.json", status="running")
    shown = said(run)
    assert shown["attempt 2"].endswith("to step 20: running") and shown["attempts"] == "2, none preempted"


def test_preemptions_that_google_announced_are_counted(run: Path) -> None:
    change(run / "run.json", status="running")
    for number in range(1, 9):
        log = Ledger(run / "ledger").new_attempt(number, machine={}, price=None, resumed_step=0)
        log.begin(0.0)
        log.heartbeat(60.0, number)
        if number in (2, 3):
            log.note("preempted")
        if number in (1, 2, 3):
            log.end(60.0, "interrupted", number)
    shown = said(run)
    assert shown["attempts"] == "8, 2 preempted, 4 ended without notice, the last 6 are shown"
    assert "attempt 2" not in shown and shown["attempt 3"] == "this machine, 1.0 min, to step 3: preempted, interrupted"
    found = as_json(look(run, time.time()))
    assert (found["preemptions"], found["ended_without_notice"], len(found["attempts"])) == (2, 4, 8)


def attempt(run: Path, work: Work, number: int, *, ended: str | None = None) -> None:
    log = Ledger(run / "ledger", work).new_attempt(number, machine={}, price=None, resumed_step=0)
    log.begin(0.0)
    log.heartbeat(60.0, None)
    if ended:
        log.end(60.0, ended, None)


def test_a_run_that_was_resumed_after_its_score_is_running(run: Path) -> None:
    change(run / "run.json", status="running")
    attempt(run, "train", 1)
    attempt(run, "evaluate", 1, ended="done")
    attempt(run, "train", 2)
    shown = said(run)
    assert shown["attempt 2"].endswith(": running") and shown["evaluation 1"].endswith(": done")
    assert shown["attempt 1"].endswith(": ended without notice") and shown["attempts"] == "3, 1 ended without notice"
    assert as_json(look(run, time.time()))["ended_without_notice"] == 1


def test_a_score_in_the_making_is_running_as_long_as_it_is_heard_of(run: Path) -> None:
    attempt(run, "train", 1, ended="done")
    for number in (1, 2):
        attempt(run, "evaluate", number)
    shown = said(run)
    assert shown["evaluation 1"].endswith(": ended without notice") and shown["evaluation 2"].endswith(": running")
    assert shown["attempts"] == "3, 1 ended without notice"
    for path in (run / "ledger").iterdir():
        os.utime(path, (time.time() + 3600, time.time() + 3600))  # as in a copy of the folder
    assert said(run, time.time() + 1200)["evaluation 2"].endswith(": ended without notice")
    path = run / "ledger/evaluation-002.jsonl"
    for damaged in ("null", "3", '"soon"', '"0001-01-01"'):
        path.write_text(re.sub(r'"at": "[^"]*"', f'"at": {damaged}', path.read_text()))
        assert said(run)["evaluation 2"].endswith(": ended without notice")


def test_the_attempts_are_in_the_order_of_their_beginnings(run: Path) -> None:
    change(run / "run.json", status="running")
    for number in range(1, 8):
        attempt(run, "evaluate", number, ended="done")
    attempt(run, "train", 1)
    path = run / "ledger/attempt-001.jsonl"
    path.write_text(path.read_text().replace('"at": "20', '"at": "21'))
    shown = list(said(run))
    assert shown[shown.index("attempts") + 1 :] == [*(f"evaluation {number}" for number in range(3, 8)), "attempt 1"]


def test_small_dollars_are_no_zeros(run: Path) -> None:
    change(run / "run.json", status="running", spending={"usd": 0.004, "ceiling_usd": 0.01, "projected_usd": 0.0067})
    assert "$0.004 of $0.01, $0.0067 at the end" in said(run)["dollars"]


def test_a_run_that_is_done_has_its_score(run: Path) -> None:
    shown = said(run)
    tuned = json.loads((run / "eval.json").read_text())["models"]["tuned"]
    assert shown["status"] == "done" and "left" not in shown["steps"]
    assert shown["score"].startswith(f"{tuned['execution_accuracy']:.1%} (95% interval")


def test_a_run_that_says_nothing_any_more_may_be_gone(run: Path) -> None:
    change(run / "run.json", status="running")
    assert "may be gone" not in said(run)["status"]
    assert "last heard of 20.0 min ago: it may be gone" in said(run, time.time() + 1200)["status"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"models": {"tuned": 3}}', '{"models": {"tuned": {"execution_accuracy": "x"}}}']
)
def test_a_damaged_eval_json_is_a_problem_and_no_score(run: Path, content: str) -> None:
    (run / "eval.json").write_text(content)
    shown = said(run)
    assert (
        "score" not in shown and str(run / "eval.json") in shown["problem"] and "finetune evaluate" in shown["problem"]
    )
    assert as_json(look(run, time.time()))["problems"] == [shown["problem"]]


def test_an_interval_that_is_none_is_a_problem(run: Path) -> None:
    evaluation = json.loads((run / "eval.json").read_text())
    evaluation["models"]["tuned"]["execution_accuracy_interval95"] = [None, None]
    (run / "eval.json").write_text(json.dumps(evaluation))
    assert "execution_accuracy_interval95 that is not a pair of numbers" in said(run)["problem"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    assert list(said(tmp_path)) == ["status"]


def test_values_of_files_write_no_escapes(run: Path) -> None:
    change(run / "run.json", status="\x1b[2J\n")
    assert "\x1b" not in said(run)["status"] and "\n" not in said(run)["status"]


def test_curve_and_bar() -> None:
    assert curve([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert curve([2.0, 2.0]) == "▁▁"
    assert len(curve(list(range(1000)), 40)) == 40
    assert [bar(share, 4) for share in (0, 0.5, 1, 2, float("nan"))] == ["░░░░", "██░░", "████", "████", "░░░░"]


def test_it_is_printed_once_where_there_is_no_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.startswith("status ")


def test_no_such_run(tmp_path: Path) -> None:
    with reported("run.not_found"):
        assert main(["watch", str(tmp_path / "runs/other")]) == 2


def test_the_live_view_follows_the_run_until_ctrl_c(run: Path) -> None:
    change(run / "run.json", status="running", steps={"done": 1, "planned": 9})
    terminal, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "finetune", "watch", str(run), "--every", "0.2"]
    process = subprocess.Popen(
        program, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
    )
    os.close(inner)
    try:
        assert "1 of 9" in _shown_until(terminal, "1 of 9")
        change(run / "run.json", steps={"done": 5, "planned": 9})
        assert "5 of 9" in _shown_until(terminal, "5 of 9")
        (run / "run.json").write_text("{")
        assert "last look" in _shown_until(terminal, "last look")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(terminal)


def _shown_until(terminal: int, text: str, seconds: float = 60.0) -> str:
    found, end = "", time.monotonic() + seconds
    while text not in found and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            found += os.read(terminal, 65536).decode(errors="replace")
    return found
