"""`finetune train --max-run-usd` and `--max-hours`: an override for a new run, an edit of the config for an existing one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.config.load import from_dict, load_config, to_dict, with_numbers
from tests.helpers.errors import reported
from tests.helpers.train_helpers import FakeTime, at_step, change, record_of

torch = pytest.importorskip("torch")

from finetune.cli.main import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]
OFTEN = {"every_minutes": 0.5}


# --- the edit of a YAML

HEAD = (
    "# finetune train c.yaml\nmodel:\n  name: m  # a model\ndata: {output_dir: p, sources: [{kind: jsonl, path: x}]}\n"
)
BUDGETS = {
    "both keys exist": "budget:\n  max_run_usd: 5.0  # of the boss\n  max_hours: 1\n",
    "one key exists": "budget:\n  # money\n  usd_per_hour: 2\n  max_hours: null\n",
    "indented": "budget:\n      usd_per_hour: 2\nlora: {r: 8}\n",
    "no value": "budget:\n  max_run_usd:\n  max_hours:\nlora: {r: 8}\n",
    "flow": "budget: {usd_per_hour: 2, max_hours: 3}\n",
    "empty flow": "budget: {}\nlora: {r: 8}\n",
    "all commented out": "budget:\n  # max_run_usd: 5\nlora: {r: 8}\n",
    "no section": "lora:\n  r: 8",
    "quoted": "'budget':\n  'max_run_usd': !!float 5\n",
    "Windows": "budget:\r\n  max_run_usd: 5.0\r\n  max_hours: 1\r\n",
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_numbers_are_set_and_everything_else_is_unchanged(budget: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes((HEAD + budget).encode())
    expected = load_config(path, ["budget.max_run_usd=40.0", "budget.max_hours=0.00001"])
    edited = with_numbers(HEAD + budget, "budget", {"max_run_usd": 40.0, "max_hours": 0.00001}, expected)
    path.write_bytes(edited.encode())
    assert to_dict(load_config(path)) == to_dict(expected)
    assert edited.startswith(HEAD)
    for comment in ("# of the boss", "# money", "# max_run_usd: 5"):
        assert (comment in edited) == (comment in budget)


@pytest.mark.parametrize(
    "budget", ["{usd_per_hour: &x 2.0, max_run_usd: *x}", "{max_run_usd: 5, max_hours: '${.max_run_usd}'}"]
)
def test_changing_a_value_does_not_change_values_that_refer_to_it(budget: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{HEAD}budget: {budget}\n")
    before = load_config(path)
    values = to_dict(before)
    values["budget"]["max_run_usd"] = 40.0
    expected = from_dict(values, "")
    edited = with_numbers(path.read_text(), "budget", {"max_run_usd": 40.0}, expected)
    path.write_text(edited)
    after = load_config(path).budget
    assert (after.max_run_usd, after.usd_per_hour, after.max_hours) == (
        40.0,
        before.budget.usd_per_hour,
        before.budget.max_hours,
    )
    assert edited.startswith("# finetune train c.yaml\n")


# --- a run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTime:
    return FakeTime(monkeypatch, tmp_path / "home")


@pytest.fixture
def stopped(tiny_config: ConfigWriter, tmp_path: Path, clock: FakeTime) -> Path:
    """A run that has stopped at its budget, after step 2 of 4. Its price is known: $36 an hour."""
    config = tiny_config(budget={"max_hours": 1.0, "usd_per_hour": 36.0}, checkpoint=OFTEN)

    def later() -> None:
        clock.seconds = 3600 - 15
        time.sleep(0.3)

    with pytest.MonkeyPatch.context() as patched:
        at_step(2, later, patched)
        assert main(["train", str(config)]) == 0
    clock.seconds = 0.0
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "budget_stop"
    return run


def test_a_stopped_run_resumes_with_the_ceilings_of_the_command_line(stopped: Path, capsys: Shown) -> None:
    before = (stopped / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["train", "--resume", str(stopped), "--max-hours", "2", "--max-run-usd", "80.5"]) == 0
    said = capsys.readouterr().err
    assert "budget.max_hours: 1.0 -> 2.0: applies, from this attempt on" in said
    assert "budget.max_run_usd: null -> 80.5: applies, from this attempt on" in said
    after = (stopped / "config.yaml").read_text()
    changed = {(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new}
    assert changed == {
        ("  max_hours: 1.0", "  max_hours: 2.0"),
        ("  max_run_usd: null", "  max_run_usd: 80.5"),
    }
    record = record_of(stopped)
    assert record["status"] == "done"
    assert (record["config"]["budget"]["max_hours"], record["spending"]["ceiling_usd"]) == (2.0, 80.5)
    assert record["spending"]["ceiling_hours"] == 2.0


@pytest.mark.parametrize("option", ["--max-run-usd", "--max-hours"])
def test_an_invalid_value_changes_nothing(option: str, stopped: Path, capsys: Shown) -> None:
    files = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    capsys.readouterr()
    for text in ("abc", "", "0", "-5", "nan", "inf", "null", "1,5", "$5"):
        with reported("cli.bad_value"):
            assert main(["train", "--resume", str(stopped), option, text]) == 2
        assert capsys.readouterr().err == f"finetune: {option}: expected a number above 0, found {text!r}\n"
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == files


def test_ceilings_are_not_written_if_another_check_fails(stopped: Path, capsys: Shown) -> None:
    """Another key that may not change, a run that is done, a ceiling in dollars without a price."""
    config = stopped / "config.yaml"
    words = ["train", "--resume", str(stopped), "--max-run-usd", "80"]
    original = config.read_text()

    def refused(code: str, key: str) -> None:
        before = config.read_text()
        capsys.readouterr()
        with reported(code):
            assert main(words) == 2
        said = capsys.readouterr().err.splitlines()
        assert key in said[-1]
        assert config.read_text() == before

    change(config, "lora", r=8)
    refused("resume.config_changed", "lora.r: 4 -> 8")
    config.write_text(original)
    change(config, "budget", usd_per_hour=None)
    refused("price.unknown", "budget.max_run_usd")
    config.write_text(original)
    assert main([*words, "--max-hours", "2"]) == 0
    refused("run.done", str(stopped))


def test_a_ceiling_that_is_still_too_low_is_written_all_the_same(stopped: Path, capsys: Shown) -> None:
    capsys.readouterr()
    with reported("budget.exhausted"):
        assert main(["train", "--resume", str(stopped), "--max-hours", "1.001"]) == 2
    assert "budget.max_hours" in capsys.readouterr().err
    assert load_config(stopped / "config.yaml").budget.max_hours == 1.001


def test_a_run_without_a_checkpoint_reports_the_change_too(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    def fail() -> None:
        raise RuntimeError("the machine is on fire")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError):
        at_step(1, fail, patched)
        main(["train", str(tiny_config())])
    run = tmp_path / "runs" / "tiny-001"
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max-hours", "7"]) == 0
    assert "budget.max_hours: null -> 7.0: applies" in capsys.readouterr().err
    assert record_of(run)["config"]["budget"]["max_hours"] == load_config(run / "config.yaml").budget.max_hours == 7.0


# --- a new run


def test_a_new_run_takes_the_ceilings_as_overrides(tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown) -> None:
    config = str(tiny_config(training={"max_steps": 1}, budget={"usd_per_hour": 1.0}))
    assert main(["train", config, "--max-run-usd", "9", "training.seed=3", "--max-hours", "8"]) == 0
    run = tmp_path / "runs" / "tiny-001"
    budget = yaml.safe_load((run / "config.yaml").read_text())["budget"]
    assert (budget["max_run_usd"], budget["max_hours"]) == (9.0, 8.0)
    assert load_config(run / "config.yaml").training.seed == 3
    capsys.readouterr()
    with reported("cli.conflicting_options"):
        assert main(["train", config, "--max-run-usd", "9", "budget.max_run_usd=10"]) == 2
    assert "--max-run-usd: same as budget.max_run_usd=" in capsys.readouterr().err
    assert main(["train", config, "--max-run-usd", "0"]) == 2
    assert not (tmp_path / "runs" / "tiny-002").exists()
