"""What a stage says when it ends: dollars only where there is a price, and commands that can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from finetune.budget.ledger import Ledger
from finetune.machine.price import VARIABLE, MachinePrice
from finetune.stage_end import tell as tell_module
from finetune.stage_end.tell import WITHIN, Next, cost_of_account, cost_of_command, finetune, tell

Shown = pytest.CaptureFixture[str]
TABLE = {
    "basis": "catalog of 2026-11-29",
    "ceiling_usd_per_hour": 5.0,
    "offers": [{"zone": "us-central1-a", "spot": True, "gpu": "A100", "usd_per_hour": 3.6}],
}


@pytest.fixture(autouse=True)
def ninety_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tell_module, "process_age", lambda: 90.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def attempt(folder: Path, seconds: float, usd: float | None, basis: str = "a catalog") -> None:
    ledger = Ledger(folder)
    price = None if usd is None else MachinePrice(usd, basis)
    log = ledger.new_attempt(ledger.next_attempt(), machine={}, price=price, resumed_step=None)
    log.begin(0.0)
    log.end(seconds, "done", 1)


def test_on_a_laptop_without_a_price_there_are_seconds_and_no_dollars() -> None:
    assert cost_of_command() == "1.5 min (measured)"


def test_a_configured_price_and_one_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    configured = "$0.050 (estimated: measured seconds x $2/h, budget.usd_per_hour of the config) for 1.5 min (measured)"
    assert cost_of_command(2.0) == configured.replace("$0.050", "$0.05")
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    launched = cost_of_command(2.0)
    assert launched.startswith("$0.0") and "catalog of 2026-11-29" in launched, "the launch's price comes first"
    monkeypatch.setenv(VARIABLE, "{}")
    assert cost_of_command(2.0) == "1.5 min (measured)", "a damaged table is no reason to invent dollars"


def test_an_account_has_the_dollars_of_its_attempts_and_says_which_have_none(tmp_path: Path) -> None:
    attempt(tmp_path, 1800, None)
    assert cost_of_account(Ledger(tmp_path).account()) == "30.0 min in 1 attempt (measured)"
    attempt(tmp_path, 3600, 3.6)
    attempt(tmp_path, 3600, 1.8, "another one")
    assert cost_of_account(Ledger(tmp_path).account()) == (
        "$5.40 (measured hours, price: a catalog and another one, without 1 attempt of unknown price) for 2.5 h in 3 attempts "
        "(measured)"
    )


def test_the_lines_go_to_stderr_and_each_command_is_on_a_line_of_its_own(
    capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    tell(
        "train", "1 s", [finetune("evaluate", "runs/a b", why="its score"), finetune("report", "runs/a\x1b", why="all")]
    )
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "train: 1 s\nnext: finetune evaluate 'runs/a b'   (its score)\n  or: finetune report 'runs/a\\x1b'   (all)\n"
    )


def test_a_program_that_path_does_not_have_is_named_by_the_path_that_works_from_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Shown
) -> None:
    programs = tmp_path / "a b" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "finetune").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path / "a b")
    assert str(finetune("runs", why="all").here()) == ".venv/bin/finetune runs   (all)"
    assert str(Next(("sky", "status"), "all").here()) == "sky status   (all)", "there is none beside"
    (programs / "sky").touch(mode=0o755)
    assert str(Next(("sky", "status"), "all").here()) == ".venv/bin/sky status   (all)"
    monkeypatch.chdir(programs)
    assert str(finetune("runs", why="all").here()) == "./finetune runs   (all)"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert str(finetune("runs", why="all").here()) == f"{shlex.quote(str(programs / 'finetune'))} runs   (all)"
    tell("run", "1 s", [finetune("launch", "task", why="there")], within=True)
    assert "next: finetune launch task " in capsys.readouterr().err, "typed on another machine than this one"
    monkeypatch.setenv("PATH", str(programs))
    assert str(finetune("runs", why="all").here()) == "finetune runs   (all)"


def test_a_program_of_a_job_leaves_it_to_the_job(monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    monkeypatch.setenv(WITHIN, "1")
    tell("train", "1 s")
    assert capsys.readouterr().err == ""
    tell("run", "1 s", within=True)
    assert capsys.readouterr().err == "run: 1 s\n"
