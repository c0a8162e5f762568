"""The wheel in an empty environment and an empty folder: what it carries, and what works without torch and SkyPilot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.data_examples import make_database, row, write_jsonl
from tests.helpers.report_fixtures import build_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]
ROOT = Path(__file__).resolve().parents[1]
ONLY_IN_A_CHECKOUT = ("finetune/", "tests/", "docs/", "benchmarks/", "chaos/", "dev/", ".ci/", ".git", ".pre-commit")
"""And what is in the root itself."""
Finetune = Callable[..., subprocess.CompletedProcess[str]]


def tracked(folder: Path) -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=folder, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and its dependencies, without an extra."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in tracked(ROOT):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(source / "dist"), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    [wheel] = (source / "dist").glob("*.whl")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *constraints, str(wheel)], check=True
    )
    return folder


@pytest.fixture
def finetune(environment: Path, tmp_path: Path) -> Finetune:
    """Runs `finetune` in an empty folder with an empty home folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(environment / "bin/finetune"), *words], cwd=tmp_path / "work", capture_output=True, text=True, timeout=300,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "LANG": "C.UTF-8"},
        )  # fmt: skip

    return run


def carried(environment: Path) -> Path:
    [found] = environment.glob("lib/python*/site-packages/finetune/project")
    return found


def test_it_carries_what_a_checkout_has_beside_the_package(environment: Path) -> None:
    expected = [name for name in tracked(ROOT) if "/" in name and not name.startswith(ONLY_IN_A_CHECKOUT)]
    expected = [name for name in expected if name != "data/.gitignore"]
    assert {"configs/demo_cpu.yaml", "sky/train_a100.yaml", "on_machine/setup.sh", "data/build.py"} < set(expected)
    for name in [*expected, ".sky.yaml", ".skyignore", "constraints.txt"]:
        assert (carried(environment) / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_it_has_every_module_and_data_file_of_the_package(environment: Path) -> None:
    for name in tracked(ROOT):
        if name.startswith("finetune/"):
            assert (carried(environment).parents[1] / name).is_file(), name


def test_commands_work_without_torch_and_skypilot(finetune: Finetune, environment: Path, tmp_path: Path) -> None:
    assert finetune("--version").stdout == "finetune 0.1.0\n"
    config = str(carried(environment) / "configs/mistral_7b_qlora.yaml")
    plan = finetune("plan", config)
    assert plan.returncode == 0 and "L4" in plan.stdout and "SNAPSHOT" in plan.stdout, plan.stderr
    work = tmp_path / "work"
    make_database(work / "databases")
    write_jsonl(work / "records.jsonl", [row(n, split=split) for n, split in enumerate(("train", "val", "test"))])
    source = "data.sources=[{kind: jsonl, path: records.jsonl, databases: databases}]"
    for words in (("data", "check"), ("data", "prepare")):
        done = finetune(*words, config, source)
        assert done.returncode == 0, done.stderr
    for name, sql in (("right", row(2)["sql"]), ("wrong", "SELECT 1")):
        (work / f"{name}.sql").write_text(f"{sql}\n")
        done = finetune("evaluate", config, "--predictions", f"{name}.sql", source)
        assert done.returncode == 0, done.stderr
    assert "won 1, lost 0" in finetune("compare", "runs/predictions/wrong", "runs/predictions/right").stdout
    shutil.copy(config, build_run(work / "runs/one") / "config.yaml")
    assert finetune("report", "runs/one").returncode == 0
    assert (work / "runs/one/report.html").is_file()
    doctor = finetune("doctor", "--cloud")
    assert doctor.returncode == 1 and "pip install 'finetune-text2sql[cloud]'" in doctor.stdout


def test_what_needs_an_extra_says_how_to_install_it(finetune: Finetune, environment: Path) -> None:
    config = str(carried(environment) / "configs/demo_cpu.yaml")
    for words, extra in (
        (["train", config], "train"),
        (["launch", str(carried(environment) / "sky/smoke.yaml")], "cloud"),
    ):
        done = finetune(*words)
        assert done.returncode == 2 and f"finetune-text2sql[{extra}]" in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_config_that_is_missing_is_looked_for_in_the_package(finetune: Finetune, environment: Path) -> None:
    done = finetune("plan", "configs/demo_cpu.yaml")
    assert done.stderr.strip().endswith(f"see {carried(environment) / 'configs'} for examples")
