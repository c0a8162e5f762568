"""The wheel in an empty environment and an empty folder: what it carries, and what works without torch and SkyPilot."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot
from tests.helpers.data_examples import make_database, row, write_jsonl
from tests.helpers.report_fixtures import build_run
from tests.helpers.sky_home import bucket_stand_in, fake_gcloud_home, run_sky, sky_server
from tests.init.conftest import DUMP, as_csv, make_library, postgres_questions, questions

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]
ROOT = Path(__file__).resolve().parents[1]
ONLY_IN_A_CHECKOUT = ("finetune/", "tests/", "docs/", "benchmarks/", "chaos/", "dev/", ".ci/", ".git", ".pre-commit")
"""And what is in the root itself."""
Finetune = Callable[..., subprocess.CompletedProcess[str]]


def tracked(folder: Path) -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=folder, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in tracked(ROOT):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(source / "dist"), str(source)], check=True)
    [wheel] = (source / "dist").glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and its dependencies, without an extra."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    began = time.monotonic()
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *constraints, str(wheel)], check=True
    )
    print(f"pip install, without extras: {time.monotonic() - began:.1f} s")
    return folder


@pytest.fixture(scope="module")
def with_skypilot(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with the wheel, and with the SkyPilot of this environment, whose installation takes minutes."""
    folder = tmp_path_factory.mktemp("with_skypilot")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin/python"),
        "--disable-pip-version-check",
        "--quiet",
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "of_this_environment.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # its own .pth files do not count
    script = Path(sysconfig.get_path("scripts"), "sky").read_text().splitlines()
    (folder / "bin/sky").write_text("\n".join([f"#!{folder / 'bin/python'}", *script[1:]]))
    (folder / "bin/sky").chmod(0o755)
    program = "import finetune.cloud.launch.travel as travel; print(travel.__file__)"
    found = subprocess.run(
        [folder / "bin/python", "-c", program], cwd=folder, check=True, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site)), "the program is the wheel's"
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
    assert doctor.returncode == 1 and "constraints.txt 'finetune-text2sql[cloud]'" in doctor.stdout


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


# a project of `finetune init`


def next_commands(printed: str) -> list[str]:
    lines = printed.partition("\nnext:\n")[2].splitlines()
    return [line.strip().partition("   (")[0] for line in lines if line.startswith("  ")]


def as_printed(environment: Path, work: Path, command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A line, as it is pasted into a shell in which the environment is active."""
    env = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8"}
    return subprocess.run(["bash", "-c", command], cwd=work, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("user", ["csv_and_database", "csv_and_postgres", "hub"])
def test_what_init_prints_works_as_printed(finetune: Finetune, environment: Path, tmp_path: Path, user: str) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    if user == "csv_and_database":
        make_library(work / "library.sqlite")
        (work / "pairs.csv").write_text(as_csv(questions(300)))
        words = ["--db", "library.sqlite", "--data", "pairs.csv"]
    elif user == "csv_and_postgres":
        (work / "schema.sql").write_text(DUMP)
        (work / "pairs.csv").write_text(as_csv(postgres_questions(300)))
        words = ["--db", "schema.sql", "--data", "pairs.csv"]
    else:
        words = ["--data", "premai-io/spider"]
    began = time.monotonic()
    done = finetune("init", "project", *words, "--yes")
    print(f"finetune init: {time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    go, *commands = next_commands(done.stdout)
    assert go == "cd project" and len(commands) == 3
    offline = [command for command in commands if "pip install" not in command]
    assert len(offline) == (1 if user == "hub" else 2), "what is not installed is installed first"
    for command in offline:
        told = as_printed(environment, work, f"{go} && {command}", home)
        assert told.returncode == 0, told.stderr
    assert "L4" in told.stdout


def test_a_form_from_a_wheel(finetune: Finetune, environment: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    make_library(work / "library.sqlite")
    go, again, *_ = next_commands(finetune("init", "project", "--db", "library.sqlite", "--yes").stdout)
    (work / "project/data/questions.csv").write_text(as_csv(questions(60)))
    done = as_printed(environment, work, f"{go} && {again}", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    for command in next_commands(done.stdout)[:2]:
        told = as_printed(environment, work, f"{go} && {command}", tmp_path / "home")
        assert told.returncode == 0, told.stderr


@pytest.fixture(scope="module")
def project(with_skypilot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    make_library(work / "library.sqlite")
    (work / "pairs.csv").write_text(as_csv(questions(300)))
    words = ["init", "project", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]
    subprocess.run(
        [with_skypilot / "bin/finetune", *words],
        cwd=work,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(work)},
    )
    return work / "project"


@pytest.fixture(scope="module")
def typed(project: Path, with_skypilot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    with bucket_stand_in() as (_, variables):
        env = fake_gcloud_home(home) | variables
        env["PATH"] = os.pathsep.join([str(home / "bin"), str(with_skypilot / "bin"), "/usr/bin", "/bin"])
        lay_out_catalog(home)
        with sky_server(env, project) as running:
            yield running


@needs_skypilot
def test_a_project_is_launched_by_the_real_skypilot(typed: dict[str, str], project: Path, with_skypilot: Path) -> None:
    words = shlex.split("finetune launch sky/train_cheapest.yaml --dryrun -y")
    done = subprocess.run(words, cwd=project, env=typed, capture_output=True, text=True, timeout=300, input="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Considered resources" in done.stdout and "Dryrun finished." in done.stdout
    assert "renewed" not in done.stdout and "WARNING" not in done.stdout
    subprocess.run(
        shlex.split("finetune plan text2sql.yaml --write sky/train_cheapest.yaml"), cwd=project, env=typed, check=True
    )
    done = run_sky(typed, project, "launch", "--dryrun", "-y", "sky/train_cheapest.yaml")
    assert done.returncode == 0 and "Dryrun finished." in done.stdout, done.stderr
    assert "are of another version" not in done.stdout


@needs_skypilot
def test_an_upgrade_is_noticed_and_the_project_renewed(
    typed: dict[str, str], project: Path, with_skypilot: Path
) -> None:
    [site] = with_skypilot.glob("lib/python*/site-packages")
    added = site / "finetune" / "of_the_next_version.py"
    added.write_text("")
    try:
        done = run_sky(typed, project, "launch", "--dryrun", "-y", "sky/train_cheapest.yaml")
        assert "`finetune launch` renews them" in done.stdout, done.stdout + done.stderr
        words = shlex.split("finetune launch sky/train_cheapest.yaml --dryrun -y")
        done = subprocess.run(words, cwd=project, env=typed, capture_output=True, text=True, timeout=300, input="")
        assert "renewed for finetune 0.1.0" in done.stdout and "Dryrun finished." in done.stdout, done.stderr
    finally:
        added.unlink()
    [wheel] = (project / "on_machine").glob("*.whl")
    wheel.unlink()
    done = run_sky(typed, project, "launch", "--dryrun", "-y", "sky/train_cheapest.yaml")
    assert done.returncode == 1 and "has no wheel of finetune" in done.stderr


@needs_skypilot
def test_the_policy_is_written_into_skypilots_config(typed: dict[str, str], project: Path) -> None:
    done = subprocess.run(
        ["finetune", "doctor", "--fix-policy"], cwd=project, env=typed, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "admin_policy: finetune.cloud.launch.policy.CostPolicy" in done.stdout
    assert "admin_policy" in (Path(typed["HOME"]) / ".sky/config.yaml").read_text()
