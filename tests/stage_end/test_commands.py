"""The commands themselves: each says on stderr what it cost and what is next, which is then typed here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli.main import main
from tests.helpers.data_examples import make_database, row, write_jsonl
from tests.helpers.next_commands import parsed

Shown = pytest.CaptureFixture[str]


def said_by(shown: Shown, *words: str) -> tuple[str, list[str]]:
    """The line about the cost and the commands after it, parsed. They are the last lines on stderr, and not on stdout."""
    shown.readouterr()
    assert main(words) == 0
    said = shown.readouterr()
    lines = said.err.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("next: ")]
    assert all(line.startswith("  or: ") for line in lines[at + 1 :])
    assert not any(line.startswith(("next: ", "  or: ")) for line in said.out.splitlines())
    return lines[at - 1], [parsed(line[len("next: ") :]) for line in lines[at:]]


def test_each_stage_says_what_the_next_one_is(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_database(tmp_path / "databases", items=60)
    source = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", [row(n) for n in range(60)]))}
    data = {"sources": [source | {"databases": str(tmp_path / "databases")}], "output_dir": str(tmp_path / "prepared")}
    config, run = str(tiny_config(data=data)), str(tmp_path / "runs" / "r")
    cost, commands = said_by(capsys, "data", "prepare", config)
    assert cost.startswith("data prepare: ") and "$" not in cost
    assert commands == [f"finetune train {config}", f"finetune plan {config}"]

    cost, commands = said_by(capsys, "train", config, "training.run_name=r")
    assert cost.startswith("train: ") and cost.endswith(" in 1 attempt (measured)") and "$" not in cost
    assert commands == [f"finetune evaluate {run}"]

    cost, _ = said_by(capsys, "train", config, "training.run_name=priced", "budget.usd_per_hour=3600")
    usd = json.loads((tmp_path / "runs" / "priced" / "run.json").read_text())["spending"]["usd"]
    told = re.match(r"train: \$(\S+) \(measured hours, price: budget.usd_per_hour of the config\) for ", cost)
    assert told and usd > 1 and float(told[1].replace(",", "")) == pytest.approx(usd, abs=0.02)

    cost, commands = said_by(capsys, "evaluate", run, "evaluation.max_questions=2")
    assert cost.startswith("evaluate: ") and "$" not in cost
    assert commands == [f"finetune report {run}"]

    cost, commands = said_by(capsys, "report", run)
    assert cost.startswith("report: ")
    assert commands == [f"finetune export {run} --to merged"]

    capsys.readouterr()
    assert main(["compare", f"{run}:base", run, "--output", str(tmp_path / "compared")]) == 0
    assert re.match(r"compare: .+ \(measured\)\n$", capsys.readouterr().err), "neither is right: nothing to export"
