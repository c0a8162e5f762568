"""`finetune sweep` as a program: its table, and what Ctrl-C and a kill do to it and to the program that trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from finetune.budget.ledger import Ledger
from finetune.cli.main import main
from finetune.machine.price import MachinePrice
from finetune.sweep.programs import Ended, LocalTrainer
from tests.helpers.errors import reported
from tests.helpers.train_helpers import adapter_of, record_of
from tests.sweep.killed import sweep, train_here

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"max_steps": 60, "eval_steps": 100}


def program(config: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "finetune", "sweep", str(config), "lora.r=2,4", "--rungs", "1", *options]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(come: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not come():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trains(run: Path) -> Callable[[], bool]:
    """Whether the run is in the middle of its training."""
    return lambda: (run / "run.json").is_file() and len(record_of(run)["history"] or ()) > 1


def programs_of(run: Path) -> list[int]:
    """Processes that train it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run.name).encode() in words and b"train" in words:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_kill_and_ctrl_c_change_nothing(write_config: ConfigWriter, tmp_path: Path) -> None:
    """The same adapters as those of a sweep that nothing interrupted."""
    config = write_config(tmp_path, training=TRAINING)
    run = tmp_path / "runs" / "tiny-sweep-t00"
    process = program(config)
    wait_for(trains(run), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while programs_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not programs_of(run), "the program ends with it"
    assert record_of(run)["status"] in ("interrupted", "paused")

    second = tmp_path / "runs" / "tiny-sweep-t01"
    process = program(config)
    wait_for(trains(second), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on" in said, said
    assert record_of(second)["status"] == "interrupted"

    process = program(config)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "the sweep is done" in said, said
    other = tmp_path / "other"
    other.mkdir()
    folder, _ = sweep(write_config(other, training=TRAINING), ["lora.r=2,4"], rungs=1)
    for name in ("tiny-sweep-t00", "tiny-sweep-t01"):
        assert adapter_of(tmp_path / "runs" / name) == adapter_of(folder.parents[1] / name)
    mine, theirs = (
        [path.read_text() for path in sorted((one / "results").iterdir())]
        for one in (tmp_path / "runs" / "sweeps" / "tiny-sweep", folder)
    )
    assert mine == theirs


def test_a_second_signal_kills_the_program(tmp_path: Path) -> None:
    """Of a stand-in that ignores the first."""
    stand_in = tmp_path / "finetune"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("")
    (stand_in / "__main__.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    (stand_in / "sweep").mkdir()
    (stand_in / "sweep" / "__init__.py").write_text("")
    (stand_in / "sweep" / "programs.py").write_text(Path(ROOT / "finetune/sweep/programs.py").read_text())
    code = (
        "import sys\nfrom finetune.sweep.programs import LocalTrainer\ntrainer = LocalTrainer()\n"
        "with trainer.on_signals():\n    ended = trainer('run', ['x'])\nprint(ended.code, trainer.interrupted)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == f"{128 + signal.SIGKILL} True\n"


def test_after_a_signal_nothing_is_started() -> None:
    assert LocalTrainer(interrupted=True)("run", ["--nonsense"]).code == 128 + signal.SIGTERM


# the command line


@pytest.fixture
def config(tiny_config: ConfigWriter) -> Path:
    return tiny_config(training={"eval_steps": 2, "max_steps": 4})


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--eta", "1"], "cli.bad_value"),
        (["--trials", "3"], "cli.conflicting_options"),
        (["--search", "optuna"], "cli.conflicting_options"),
        (["--max-sweep-usd", "5"], "price.unknown"),
        (["budget.usd_per_hour=2"], "sweep.no_budget"),
        (["--name", "a/b"], "sweep.bad_name"),
        (["lora.no=1,2"], "config.unknown_key"),
        (["training.eval_steps=0"], "sweep.no_validation"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(config: Path, options: list[str], code: str) -> None:
    with reported(code):
        assert main(["sweep", str(config), "lora.r=2,4", *options]) == 2
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize("usd", ["0", "-1", "nan", "inf", "much", ""])
def test_a_budget_that_is_none(config: Path, usd: str, capsys: Shown) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", str(config), "lora.r=2,4", f"--max-sweep-usd={usd}"])
    assert "--max-sweep-usd: expected a number above 0" in capsys.readouterr().err


def test_a_damaged_sweep_is_one_line(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = sweep(config, ["lora.r=2,4"])
    text = (folder / "sweep.json").read_text()
    for damaged, code in (
        (text[: len(text) // 2], "file.bad_json"),
        (text.replace('"trials": 2', '"trials": "2"'), "sweep.bad_record"),
        (text.replace('"eta": 2', '"eta": 1'), "sweep.bad_record"),
    ):
        (folder / "sweep.json").write_text(damaged)
        with reported(code):
            assert main(["sweep", str(config), "lora.r=2,4"]) == 2
        with reported(code):
            assert main(["compare", str(folder)]) == 2


# a budget, on a fake price


def books(folder: Path, seconds: float) -> None:
    """A ledger with that many seconds, at a dollar each."""
    for path in folder.glob("*"):
        path.unlink()
    log = Ledger(folder).new_attempt(1, machine={}, price=MachinePrice(3600.0, "in this test"), resumed_step=None)
    log.begin(0.0)
    log.end(seconds, "paused", None)


@pytest.fixture
def paid(tiny_config: ConfigWriter) -> Path:
    """A dollar a second; 0.2 s between two checkpoints."""
    return tiny_config(
        training={"eval_steps": 2, "max_steps": 4},
        budget={"usd_per_hour": 3600.0},
        checkpoint={"every_minutes": 0.2 / 60, "save_steps": None},
    )


def test_a_budget_ends_it_and_a_higher_one_goes_on(paid: Path, tmp_path: Path, capsys: Shown) -> None:
    """Each program has spent 30 cents; the budget does not reach for a fourth."""
    granted: list[float] = []

    def train(name: str, words: Sequence[str]) -> Ended:
        place = words.index("--max-run-usd")
        granted.append(float(words[place + 1]))
        ended = train_here(name, [*words[:place], *words[place + 2 :]])
        books(tmp_path / "runs" / name / "ledger", 0.3)
        return ended

    folder, outcome = sweep(paid, ["lora.r=2,4,8"], train, usd=1.0, rungs=1, start_seconds=0.0)
    assert outcome.why == "budget" and "$0.9000 of $1 are spent" in outcome.detail and outcome.code == 0
    assert granted == pytest.approx([1.0, 0.7, 0.4])
    assert main(["compare", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "best so far" in said and "$0.9000" in said
    _, outcome = sweep(paid, ["lora.r=2,4,8"], train, usd=3.0, rungs=1, start_seconds=0.0)
    assert outcome.why == "done"


def test_a_trial_that_its_own_meter_refuses_is_not_dropped(paid: Path, tmp_path: Path) -> None:
    """Its start took longer than was allowed for: that is the budget's end, and no fault of the trial."""
    calls: list[str] = []

    def train(name: str, words: Sequence[str]) -> Ended:
        calls.append(name)
        if len(calls) == 1:
            train_here(name, [*words[: words.index("--stop-after-step")], "--stop-after-step", "1"])
        books(tmp_path / "runs" / name / "ledger", 0.45 * len(calls))
        return Ended(2)

    folder, outcome = sweep(paid, ["lora.r=2,4,8"], train, usd=1.0, workers=2, rungs=1, start_seconds=0.0)
    assert (outcome.code, outcome.why) == (0, "budget") and not (folder / "results").exists()
    assert calls == ["tiny-sweep-t00"] * 2, "with the rest of the money once more"


# its table and its page


def test_compare_makes_the_table_and_the_page(config: Path, capsys: Shown) -> None:
    folder, _ = sweep(config, ["training.learning_rate=1e-4,1e-2", "lora.r=2,4"])
    capsys.readouterr()
    assert main(["compare", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 4 and found["basis"].startswith("measured") and found["best"]
    assert main(["compare", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run",
        "settings",
        *["loss", "at", "1", "loss", "at", "2", "at", "the", "end", "$", "hours"],
    ]
    assert [line.split()[0] for line in lines[1:5]] == [f"tiny-sweep-t0{number}" for number in range(4)]
    assert sum("done, best so far" in line for line in lines) == 1
    assert sum("stopped after step" in line for line in lines) == 3
    value = json.loads((folder / "report" / "sweep.json").read_text())
    assert value["best"] and len(value["trials"]) == 4 and value["usd"] is None
    page = (folder / "report" / "sweep.html").read_text()
    assert page.count("<svg") == 1 and "training.learning_rate" in page and "vertical lines" in page
    assert all(f"t0{number}" in page for number in range(4))


def test_compare_of_one_that_is_no_sweep(config: Path, tmp_path: Path) -> None:
    with reported("cli.conflicting_options"):
        assert main(["compare", str(tmp_path)]) == 2
    from finetune.report.sweep import write_sweep
    from tests.helpers.errors import raises

    with raises("sweep.not_found"):
        write_sweep(tmp_path)


def test_the_table_of_a_sweep_that_has_just_begun(config: Path, capsys: Shown) -> None:
    from finetune.sweep.open import Wanted, open_sweep

    opened = open_sweep(Wanted(config, ["lora.r=2,4"]))
    opened.create()
    assert main(["compare", str(opened.folder.path)]) == 0
    assert capsys.readouterr().out.count("not compared yet") == 2
