"""`finetune runs`: all runs of a folder, whatever state they are in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.budget.ledger import Ledger
from finetune.cli.main import main
from finetune.machine.price import MachinePrice
from finetune.report.runs import RunRow, SortKey, in_order, rows_of, table
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import build_run, change

ESCAPE = "\x1b[31m"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A scored run with a ledger, one that is being trained, one without a record, and what is no run."""
    folder = tmp_path / "runs"
    scored = build_run(folder / "scored", questions=40, started_at="2026-11-01T10:00:00+00:00")
    for work in ("train", "evaluate"):
        log = Ledger(scored / "ledger", work).new_attempt(
            1, machine={}, price=MachinePrice(0.5, "catalog"), resumed_step=None
        )
        log.begin(0.0)
        log.end(3600.0, "done", 10)
    training = build_run(folder / "training", questions=10, status="running", started_at="2026-11-02T10:00:00+00:00")
    (training / "eval.json").unlink()
    for name in ("fresh", "base", "predictions"):
        (folder / name).mkdir()
    (folder / "fresh/config.yaml").write_text("")
    (folder / "notes.txt").write_text("")
    return folder


def test_every_run_has_a_row(runs: Path) -> None:
    fresh, scored, training = rows_of(runs)
    assert (fresh.name, fresh.status, fresh.accuracy) == ("fresh", "not started", None)
    assert (training.status, training.accuracy, training.usd) == ("running", None, None)
    evaluation = json.loads((runs / "scored/eval.json").read_text())["models"]
    assert scored.accuracy == evaluation["tuned"]["execution_accuracy"]
    assert scored.interval == tuple(evaluation["tuned"]["execution_accuracy_interval95"])
    assert scored.base_accuracy == evaluation["base"]["execution_accuracy"]
    assert (scored.hours, scored.usd) == (2.0, 1.0), "training and score"
    assert not any(row.problem for row in (fresh, scored, training))


def test_the_table_has_the_newest_first_and_says_what_its_figures_are(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["run", "training", "scored", "fresh"]
    assert lines[0].split()[:3] == ["run", "status", "model"]
    row = rows_of(runs)[1]
    assert row.accuracy is not None and f"{row.accuracy:.1%}" in lines[2] and "1.00" in lines[2]
    assert "measured seconds times the machine's price" in lines[-2]
    assert lines[-1] == "$ a point: dollars for each point (1% of the questions) gained over the base model."


def test_json_has_everything(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--json", "--sort", "name"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == ["fresh", "scored", "training"]
    assert found[1] == json.loads(json.dumps(rows_of(runs)[1].as_dict()))


@pytest.mark.parametrize(
    ("key", "order"),
    [("name", "abcd"), ("score", "bacd"), ("usd", "cabd"), ("point", "bacd"), ("started", "cbad")],
)
def test_an_order_has_what_is_unknown_last(key: SortKey, order: str) -> None:
    rows = [
        RunRow("d"),
        RunRow("c", usd=1, started_at="2026-03"),
        RunRow("b", accuracy=0.5, usd_per_point=0.1, started_at="2026-02"),
        RunRow("a", accuracy=0.4, usd=2, usd_per_point=0.2, started_at="2026-01"),
    ]
    assert "".join(row.name for row in in_order(rows, key)) == order


@pytest.mark.parametrize(
    ("file", "content"),
    [("run.json", "{"), ("run.json", '{"steps": 3}'), ("eval.json", "[]"), ("eval.json", "\x00"), ("eval.json", '{"models": 1}'),
     ("eval.json", '{"models": {"tuned": {"correct": 1}}}')],
)  # fmt: skip
def test_a_damaged_run_keeps_its_row_and_the_others(runs: Path, file: str, content: str) -> None:
    (runs / "scored" / file).write_text(content)
    _, scored, training = rows_of(runs)
    assert scored.problem and file in scored.problem
    assert scored.usd == 1.0, "what can be read is shown"
    assert training.problem is None and training.status == "running"
    assert any(line.startswith("scored: ") and file in line for line in table([scored]))


def test_what_the_ledger_cannot_count_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Ledger(runs / "scored/ledger").new_attempt(2, machine={}, price=None, resumed_step=10)
    log.begin(0.0)
    log.end(36_000.0, "done", 20)
    scored = rows_of(runs)[1]
    assert (scored.hours, scored.usd) == (12.0, 1.0)
    assert scored.problem == f"{runs / 'scored/ledger'}: no price for attempt 2; not in the dollars"
    path = runs / "scored/ledger/attempt-001.jsonl"
    path.write_text(path.read_text()[:20])
    assert main(["runs", str(runs)]) == 0
    assert f"\nscored: {path}: nothing in it is readable; not counted; " in capsys.readouterr().out
    assert main(["runs", str(runs), "--json", "--sort", "name"]) == 0
    assert "not counted" in json.loads(capsys.readouterr().out)[1]["problem"]


def test_a_ledger_that_is_no_folder_is_said(runs: Path) -> None:
    (runs / "training/ledger").write_text("")
    assert str(rows_of(runs)[2].problem).startswith(f"{runs / 'training/ledger'}: ")


def test_small_dollars_are_no_zeros() -> None:
    cheap = table([RunRow("a", usd=0.004, usd_per_point=0.00042), RunRow("b", usd=1234.5, usd_per_point=2.0)])
    assert cheap[1].split()[-3:-1] == ["0.004", "0.00042"] and cheap[2].split()[-3:-1] == ["1,234.50", "2.00"]


def test_names_and_states_write_no_escapes(runs: Path) -> None:
    change(runs / "scored/run.json", status=f"done{ESCAPE}")
    (runs / f"{ESCAPE}x").mkdir()
    (runs / f"{ESCAPE}x/run.json").write_text(json.dumps({"status": "x" * 100}))
    text = "\n".join(table(rows_of(runs)))
    assert "\x1b" not in text and "x" * 41 not in text


def test_no_folder_and_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == "no runs\n"
    (tmp_path / "file").write_text("")
    for name, found in (("file", "a file"), ("missing", "nothing")):
        with raises("run.not_found", match=f"expected a folder of runs, found {found}"):
            rows_of(tmp_path / name)
