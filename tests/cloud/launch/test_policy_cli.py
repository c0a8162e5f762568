"""The commands as a user types them from the repository root, through SkyPilot's real command line and API server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.machine.gpus import machine_name
from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot
from tests.helpers.sky_home import Buckets, bucket_stand_in, fake_gcloud_home, run_sky, sky_server

pytestmark = [pytest.mark.slow, needs_skypilot]
ROOT = Path(__file__).resolve().parents[3]
LEFT_OUT = (".venv", ".git", "runs", ".whl", ".*_cache", ".hypothesis", "built", "prepared", "__pycache__")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.fixture(scope="module")
def buckets() -> Iterator[tuple[Buckets, dict[str, str]]]:
    with bucket_stand_in() as both:
        yield both


@pytest.fixture(scope="module")
def typed(
    tmp_path_factory: pytest.TempPathFactory, checkout: Path, buckets: tuple[Buckets, dict[str, str]]
) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home) | buckets[1]
    lay_out_catalog(home)
    with sky_server(env, checkout) as running:
        yield running


def test_a_dry_run_of_the_cheapest_shows_its_candidates(
    typed: dict[str, str], checkout: Path, buckets: tuple[Buckets, dict[str, str]]
) -> None:
    done = run_sky(typed, checkout, "launch", "--dryrun", "-y", "sky/train_cheapest.yaml")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    order = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(order) == 12 and order[0].startswith("1.   L4 spot, g2-standard-8")
    dollars = [float(line.split()[-1]) for line in order]
    assert dollars == sorted(dollars)
    assert "Considered resources" in done.stdout and "Dryrun finished." in done.stdout
    assert list(buckets[0].made) == ["finetune-text2sql-test-you"]


def test_finetune_launch_is_held_by_the_policy_in_another_folder(
    typed: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    """`sky launch` typed there would not be: SkyPilot reads no .sky.yaml there."""
    task = checkout / "sky" / "dear.yaml"
    task.write_text((checkout / "sky" / "train_a100.yaml").read_text().replace("cost: 4.50", "cost: 0.50"))
    words = [sys.executable, "-m", "finetune", "launch", str(task), "--dryrun", "-y"]
    env = typed | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        words, env=env, cwd=tmp_path, input="", capture_output=True, text=True, timeout=180, check=False
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 1 and f"in {checkout}: sky launch sky/dear.yaml --dryrun -y" in done.stdout
    assert "max_hourly_cost" in done.stderr and "Considered resources" not in done.stdout


def test_an_env_file_of_another_folder_is_found_and_its_values_stay_settings(
    typed: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    (tmp_path / "my.env").write_text("CONFIG=configs/mistral_7b_quick.yaml\nMAX_RUN_USD=300\nHF_TOKEN=hf_of_the_file\n")
    task = str(checkout / "sky" / "train_t4.yaml")
    words = [sys.executable, "-m", "finetune", "launch", task, "--env-file", "my.env", "--env", "MAX_RUN_USD=0.01"]
    done = subprocess.run(
        [*words, "--dryrun", "-y"],
        env=typed | {"PYTHONPATH": str(checkout)},
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 1 and done.stdout.startswith("configs/mistral_7b_quick.yaml: ")
    assert "MAX_RUN_USD=0.01 would be used up before a checkpoint" in done.stderr
    assert "hf_of_the_file" not in done.stdout + done.stderr


def test_an_a100_on_demand_is_refused_at_three_dollars(typed: dict[str, str], checkout: Path) -> None:
    task = checkout / "sky" / "train_a100.yaml"
    text = task.read_text().replace("max_hourly_cost: 4.50", "max_hourly_cost: 3.00")
    (checkout / "on_demand.yaml").write_text(text.replace("    - {use_spot: true}\n", ""))
    done = run_sky(typed, checkout, "launch", "-y", "on_demand.yaml")
    print(done.stderr)
    assert done.returncode == 1
    assert "3.701 = 0.739 host + 2.934 GPU + 0.027 disk" in done.stderr
    assert "max_hourly_cost: 3.71 would allow it" in done.stderr
    assert "Traceback" not in done.stderr and "Considered resources" not in done.stdout


def test_words_beside_a_task_are_no_shell_command(typed: dict[str, str], checkout: Path) -> None:
    """SkyPilot itself takes the whole for a command that a machine of its own choice is to run."""
    for command in (("launch", "--dryrun", "-y"), ("jobs", "launch", "-y")):
        done = run_sky(typed, checkout, *command, "sky/train_cheapest.yaml", "lora.r=8")
        assert done.returncode == 1, done.stdout
        assert "lora.r=8: beside a task SkyPilot takes options only; type `--env OVERRIDES=lora.r=8`" in done.stderr
        assert "Traceback" not in done.stderr and "Considered resources" not in done.stdout


def test_a_managed_job_shows_its_controllers_price_before_the_prompt(typed: dict[str, str], checkout: Path) -> None:
    done = run_sky(typed, checkout, "jobs", "launch", "sky/train_spot.yaml", typed="n\n")
    assert done.returncode == 1
    assert done.stdout.index("starts a controller machine") < done.stdout.index("Proceed?")
    assert "n2-standard-4, from $0." in done.stdout


def test_the_plan_has_the_same_order_as_the_launch(typed: dict[str, str], checkout: Path) -> None:
    """`finetune plan` and the policy rank the best offer of each kind of machine in the same order."""
    import subprocess

    plan = subprocess.run(
        ["finetune", "plan", "configs/mistral_7b_qlora.yaml", "--json"],
        cwd=checkout, env=typed, check=True, capture_output=True, text=True,
    )  # fmt: skip
    rows = [row for row in json.loads(plan.stdout)["rows"] if row["chosen"]]
    planned = [(machine_name(row["gpu"], row["count"]), row["spot"]) for row in rows]
    done = run_sky(typed, checkout, "launch", "--dryrun", "-y", "sky/train_cheapest.yaml")
    kinds = [line.split()[1:3] for line in done.stdout.splitlines() if line[:1].isdigit()]
    launched = list(dict.fromkeys((gpu, kind.startswith("spot")) for gpu, kind in kinds))
    assert launched == planned[: len(launched)]
