"""`finetune compare SWEEP`: the dollars and hours of all ledgers, and commands that work from wherever they are typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from finetune.budget.attempts import Work
from finetune.budget.ledger import Ledger
from finetune.cli.main import main
from finetune.config.load import config_hash, load_config, to_dict
from finetune.machine.price import MachinePrice
from finetune.report.sweep import write_sweep
from finetune.sweep.folder import Sweep, SweepFolder, Trial
from tests.helpers.report_fixtures import Page
from tests.helpers.scored_runs import scored_run

ROOT = Path(__file__).resolve().parents[2]
Shown = pytest.CaptureFixture[str]


def spent(ledger: Path, hours: float, *, work: Work = "train", usd_per_hour: float | None = 2.0) -> Path:
    price = None if usd_per_hour is None else MachinePrice(usd_per_hour, "catalog")
    log = Ledger(ledger, work).new_attempt(1, machine={}, price=price, resumed_step=None)
    log.begin(0.0)
    log.end(3600 * hours, "done", None)
    return log.path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two trials of half an hour each, both scored, and an hour besides them; of machines at $2/h."""
    runs, config = tmp_path / "my proj" / "runs", load_config(ROOT / "configs/demo_cpu.yaml")
    folder = SweepFolder(runs, "lr x")
    settings = [["lora.r=2"], ["lora.r=4"]]
    folder.create(
        Sweep("lr x", to_dict(config), config_hash(config), {"lora.r": "2,4"}, "grid", 2, 0, 2, [60], settings)
    )
    for trial in range(2):
        run = scored_run(runs, f"lr x-t{trial:02d}", right=0.3 + 0.3 * trial, usd=None)
        (run / "config.yaml").touch()
        spent(run / "ledger", 0.5)
        folder.add_trial(Trial(trial, run.name, settings[trial]))
    spent(folder.path / "ledger", 1.0, work="sweep")
    return folder.path


def test_the_hours_besides_the_trials_are_said_apart(sweep: Path) -> None:
    report = write_sweep(sweep)
    assert report.cost == (
        "$4.0000 and 2.000 h in 3 attempts (measured hours x the price of each machine); "
        "of that $2.0000 and 1.000 h in 1 attempt besides the trials"
    )
    found = report.as_json()
    assert [found[key] for key in ("usd", "own_usd", "hours", "own_hours")] == [4.0, 2.0, 2.0, 1.0]
    assert [found[key] for key in ("attempts", "own_attempts", "problems")] == [2, 1, []]


def test_without_a_price_the_hours_are_said_apart_too(sweep: Path) -> None:
    for file in [sweep / "ledger/sweep-001.jsonl", *sweep.parents[1].glob("lr x-t*/ledger/attempt-001.jsonl")]:
        file.unlink()
        spent(file.parent, 1.0, work="sweep" if file.name.startswith("sweep") else "train", usd_per_hour=None)
    report = write_sweep(sweep)
    assert report.cost == "3.000 h on the meters (measured), no price; of that 1.000 h in 1 attempt besides the trials"
    assert report.problems == []


def test_what_the_ledgers_cannot_count_is_said(sweep: Path, capsys: Shown) -> None:
    runs = sweep.parents[1]
    torn = next((runs / "lr x-t00/ledger").iterdir())
    torn.write_text(torn.read_text()[:20])
    (runs / "lr x-t01/eval.json").write_text("{")
    (sweep / "ledger/sweep-001.jsonl").unlink()
    spent(sweep / "ledger", 1.0, work="sweep", usd_per_hour=None)
    assert main(["compare", str(sweep)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert "lr x-t01/eval.json: not readable as JSON" in shown[0]
    assert shown[1:] == [
        f"problem: {torn}: nothing in it is readable; not counted",
        "problem: no price for any attempt of lr x-t00, the sweep itself; not in the dollars",
    ]
    found = json.loads((sweep / "report/sweep.json").read_text())
    assert [f"problem: {problem}" for problem in found["problems"]] == shown
    assert (found["usd"], found["own_usd"], found["own_hours"]) == (1.0, None, 1.0)
    page = Page((sweep / "report/sweep.html").read_text()).text
    assert all(problem in page for problem in found["problems"])


@pytest.mark.parametrize(
    ("here", "given"),
    [
        (".", "my proj/runs/sweeps/lr x"),
        ("my proj/runs", "sweeps/lr x"),
        ("my proj/runs/sweeps", "lr x"),
        ("my proj/runs/sweeps/lr x", "."),
        ("my proj/runs/sweeps/lr x", "../lr x"),
    ],
)
def test_the_next_command_works_where_it_is_typed(
    sweep: Path, tmp_path: Path, here: str, given: str, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.chdir(tmp_path / here)
    assert main(["compare", given]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the scored ones")]
    _, command, *words = shlex.split(line.partition(": ")[2])
    assert [Path(word).resolve() for word in words] == [sweep.parents[1] / f"lr x-t0{trial}" for trial in range(2)]
    assert Path(words[0]).is_absolute() == ("sweeps" in here), "relative where that needs no .."
    assert main([command, *words, "--output", str(tmp_path / "out")]) == 0
