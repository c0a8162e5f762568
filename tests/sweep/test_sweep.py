"""A sweep of the tiny model: its decisions, its runs, and that kills change neither."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import raises
from tests.helpers.train_helpers import adapter_of, change, record_of

torch = pytest.importorskip("torch")

from finetune.budget.claims import Claim, ClaimFolder  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.errors import TransientError  # noqa: E402
from finetune.machine.process import ProcessId  # noqa: E402
from finetune.sweep.folder import SweepFolder  # noqa: E402
from finetune.sweep.programs import Ended  # noqa: E402
from tests.sweep.killed import sweep, train_here  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"max_steps": 8, "eval_steps": 100}
LORA = {"lora_dropout": 0.2}
WORDS = ("training.learning_rate=1e-4,1e-2", "lora.r=2,4")
KILLS = (2, 3, 6, 9, 14, 23)
"""The events at which the processes of one sweep are killed, one after the other: whichever the place, it goes on there."""


def config_of(write_config: ConfigWriter, folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, training=TRAINING, lora=LORA, **sections)


@pytest.fixture(scope="module")
def whole(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing interrupted."""
    folder, outcome = sweep(config_of(write_config, tmp_path_factory.mktemp("whole")), WORDS)
    assert (outcome.code, outcome.why) == (0, "done")
    return folder


def results_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "results").iterdir())}


def trials_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.parents[1].glob("tiny-sweep-t*"))}


def test_the_best_half_goes_on_at_each_comparison(whole: Path) -> None:
    results = {name: json.loads(text) for name, text in results_of(whole).items()}
    at = [
        {name[:3]: result["loss"] for name, result in results.items() if name.endswith(f"-r{n}.json")} for n in range(3)
    ]
    assert [len(losses) for losses in at] == [4, 2, 1]
    for here, following in itertools.pairwise(at):
        assert set(following) == set(sorted(here, key=lambda trial: here[trial])[: len(following)])
    assert {result["step"] for name, result in results.items() if "-r0" in name} == {2}
    statuses = [record_of(run)["status"] for run in trials_of(whole).values()]
    assert (statuses.count("done"), statuses.count("paused")) == (1, 3)


def test_a_trial_is_the_run_that_it_would_be_alone(whole: Path, write_config: ConfigWriter, tmp_path: Path) -> None:
    name, run = next((name, run) for name, run in trials_of(whole).items() if record_of(run)["status"] == "done")
    settings = json.loads((whole / "trials" / f"{name[-3:]}.json").read_text())["settings"]
    assert main(["train", str(config_of(write_config, tmp_path)), *settings]) == 0
    alone = tmp_path / "runs" / "tiny-001"
    assert adapter_of(alone) == adapter_of(run)
    assert record_of(alone)["losses"]["last"] == record_of(run)["losses"]["last"]


@pytest.mark.repeat
@pytest.mark.parametrize("first", range(4))
def test_kills_at_more_places_change_nothing(
    whole: Path, write_config: ConfigWriter, tmp_path: Path, first: int
) -> None:
    check_killed(whole, config_of(write_config, tmp_path), [kill + first for kill in KILLS])


def test_kills_change_nothing(whole: Path, write_config: ConfigWriter, tmp_path: Path) -> None:
    check_killed(whole, config_of(write_config, tmp_path), KILLS[2::2])


def check_killed(whole: Path, config: Path, kills: Sequence[int]) -> None:
    """The same trials, decisions and adapters, byte for byte."""
    for kill in (*kills, 0):
        words = [sys.executable, "-m", "tests.sweep.killed", str(kill), str(config), *WORDS]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    folder = config.parent / "runs" / "sweeps" / "tiny-sweep"
    assert results_of(folder) == results_of(whole)
    mine, theirs = trials_of(folder), trials_of(whole)
    assert list(mine) == list(theirs)
    for name, run in mine.items():
        assert adapter_of(run) == adapter_of(theirs[name]), name
        assert record_of(run)["steps"] == record_of(theirs[name])["steps"]


def test_two_workers_share_the_trials(whole: Path, write_config: ConfigWriter, tmp_path: Path) -> None:
    """Each as a process of its own, at once; what they do not train, the next one does."""
    config = config_of(write_config, tmp_path)
    words = [sys.executable, "-m", "tests.sweep.killed", "0", str(config), *WORDS]
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folder = config.parent / "runs" / "sweeps" / "tiny-sweep"
    assert results_of(folder) == results_of(whole)
    trained = [{line.split()[0] for line in text.splitlines() if "): training to" in line} for text in said]
    assert all(trained), "both have trained"
    assert {name: adapter_of(run) for name, run in trials_of(folder).items()} == {
        name: adapter_of(run) for name, run in trials_of(whole).items()
    }
    assert max(record_of(run)["attempts"] for run in trials_of(folder).values()) <= 3, "no trial was trained twice"


def test_a_finished_sweep_trains_nothing_more(whole: Path) -> None:
    def refuse(name: str, words: Sequence[str]) -> Ended:
        pytest.fail(f"trains {name}")

    before = results_of(whole)
    folder, outcome = sweep(whole.parents[2] / "tiny.yaml", WORDS, refuse)
    assert (folder.resolve(), outcome.why, results_of(whole)) == (whole.resolve(), "done", before)


def test_another_sweep_of_the_same_name_is_refused(whole: Path) -> None:
    config = whole.parents[2] / "tiny.yaml"
    with raises("sweep.other", match=r"lora.r: 2,4 -> 2,8"):
        sweep(config, [WORDS[0], "lora.r=2,8"])
    with raises("sweep.other", match=r"training.weight_decay: 0.0 -> 0.5"):
        sweep(config, [*WORDS, "training.weight_decay=0.5"])
    with raises("sweep.other", match="eta: 2 -> 3"):
        sweep(config, WORDS, eta=3)


def test_what_is_not_learned_may_change(whole: Path) -> None:
    _, outcome = sweep(whole.parents[2] / "tiny.yaml", [*WORDS, "training.logging_steps=3", "tracking.wandb=disabled"])
    assert outcome.why == "done"


def test_a_folder_that_is_another_run_is_refused(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = config_of(write_config, tmp_path)
    taken = ["training.run_name=tiny-sweep-t00", "lora.r=8", "training.max_steps=1"]
    assert main(["train", str(config), *taken]) == 0
    with raises("sweep.trial_taken"):
        sweep(config, ["lora.r=2,4"])


def test_a_trial_that_diverges_is_dropped(write_config: ConfigWriter, tmp_path: Path) -> None:
    """A learning rate at which the loss is not finite ends that trial, and not the sweep."""
    config = config_of(write_config, tmp_path)

    def train(name: str, words: Sequence[str]) -> Ended:
        code = main(["train", *words])
        if name.endswith("t00"):
            run = tmp_path / "runs" / name
            record = record_of(run)
            record["history"] = [row | {"eval_loss": None} if "eval_loss" in row else row for row in record["history"]]
            (run / "run.json").write_text(json.dumps(record))
        return Ended(code)

    folder, outcome = sweep(config, ["lora.r=2,4,8"], train)
    results = SweepFolder(folder.parents[1], folder.name).results()
    assert outcome.why == "done" and results[0, 0].loss is None and "diverged" in results[0, 0].why
    assert {trial for trial, rung in results if rung} <= {1, 2}


def test_a_trial_that_fails_is_dropped_but_not_the_first(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = config_of(write_config, tmp_path)
    failing = {"tiny-sweep-t00"}

    def train(name: str, words: Sequence[str]) -> Ended:
        return Ended(2) if name in failing else train_here(name, words)

    folder, outcome = sweep(config, ["lora.r=2,4,8"], train)
    assert (outcome.code, outcome.why) == (2, "failed") and not results_exist(folder), "a fault of them all, perhaps"
    failing.clear()
    failing.add("tiny-sweep-t01")
    folder, outcome = sweep(config, ["lora.r=2,4,8"], train)
    result = SweepFolder(folder.parents[1], folder.name).results()[1, 0]
    assert outcome.why == "done" and result.loss is None and result.why == "failed with exit code 2"


def test_a_trial_that_another_machine_trains_is_not_dropped(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = config_of(write_config, tmp_path)

    def train(name: str, words: Sequence[str]) -> Ended:
        claims = ClaimFolder(tmp_path / "runs" / name / "lease")
        claims.folder.mkdir(parents=True)
        claims.write(Claim(1, "a" * 16, "live", ProcessId("another boot", 7, 7, "another"), 60.0))
        return Ended(2)

    with raises("sweep.held", kind=TransientError):
        sweep(config, ["lora.r=2,4"], train)


def results_exist(folder: Path) -> bool:
    return (folder / "results").is_dir() and any((folder / "results").iterdir())


def test_an_interrupted_program_ends_the_worker_with_75(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = config_of(write_config, tmp_path)
    _, outcome = sweep(config, ["lora.r=2,4"], lambda name, words: Ended(75))
    assert outcome.code == 75
    killed: list[str] = []
    _, outcome = sweep(config, ["lora.r=2,4"], lambda name, words: killed.append(name) or Ended(137))  # type: ignore[func-returns-value]
    assert outcome.code == 75 and killed == ["tiny-sweep-t00"] * 3, "started again twice"


def test_a_limit_of_the_machine_ends_the_worker_with_0(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = config_of(write_config, tmp_path)
    _, outcome = sweep(config, ["lora.r=2,4"], lambda name, words: Ended(0, "MAX_HOURS=1"))
    assert (outcome.code, outcome.why, outcome.detail) == (0, "limit", "MAX_HOURS=1")


def test_its_config_is_its_own(write_config: ConfigWriter, tmp_path: Path) -> None:
    """An edit of the config file after the begin is refused, and changes no trial."""
    config = config_of(write_config, tmp_path)
    folder, _ = sweep(config, ["lora.r=2,4"], lambda name, words: Ended(75))
    change(config, "lora", lora_alpha=64)
    with raises("sweep.other", match="lora.lora_alpha"):
        sweep(config, ["lora.r=2,4"])
    assert "lora_alpha: 8" in (folder / "config.yaml").read_text()
