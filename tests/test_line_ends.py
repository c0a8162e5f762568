"""Line ends: a checkout has Unix ones, and a file with Windows ones works, or one message names the remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune.config.load import load_config, to_dict
from finetune.data.records import read_records
from finetune.doctor.local import line_end_checks
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.data_examples import row, write_jsonl
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[1]
POLICY = "finetune.cloud.launch.policy.CostPolicy"


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def to_windows(path: Path) -> Path:
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    return path


# --- a checkout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a Windows user's git checks the project out."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    folder = tmp_path_factory.mktemp("clone") / "project"
    git(ROOT, "-c", "core.autocrlf=true", "clone", "--quiet", "--no-tags", f"file://{ROOT}", str(folder))
    git(folder, "config", "core.autocrlf", "true")
    return folder


def windows_files(folder: Path) -> set[str]:
    """Tracked text files with a CR."""
    names = git(folder, "ls-files", "-z").split("\0")
    texts = [name for name in names if name and not name.endswith(".png")]
    assert len(texts) > 300
    return {name for name in texts if b"\r" in (folder / name).read_bytes()}


def test_a_checkout_with_autocrlf_has_no_carriage_return(clone: Path) -> None:
    assert windows_files(clone) == set()
    for script in sorted((clone / "on_machine").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_without_gitattributes_there_are_carriage_returns(clone: Path, tmp_path: Path) -> None:
    """The same checkout without our attributes: git then writes carriage returns, so the test above can fail."""
    bare = tmp_path / "without"
    git(clone, "clone", "--quiet", "--no-checkout", f"file://{clone}", str(bare))
    (bare / ".git" / "info" / "attributes").write_text("* text=auto !eol\n")
    git(bare, "-c", "core.autocrlf=true", "checkout", "--quiet")
    assert {"Makefile", "on_machine/setup.sh", "sky/train_t4.yaml", "data/build.py"} <= windows_files(bare)


# --- a working copy with Windows line ends


def test_doctor_names_the_scripts_and_the_command_that_fixes_them(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "on_machine", tmp_path / "on_machine")
    shutil.copy(ROOT / "Makefile", tmp_path)
    [good] = line_end_checks(tmp_path)
    assert (good.status, good.found) == ("ok", "LF")
    to_windows(tmp_path / "Makefile")
    to_windows(tmp_path / "on_machine" / "setup.sh")
    [bad] = line_end_checks(tmp_path)
    assert (bad.status, bad.found) == ("missing", "CR LF in Makefile and 1 more")
    command = bad.advice.split("`")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "Makefile").read_bytes() == (ROOT / "Makefile").read_bytes()
    assert [check.status for check in line_end_checks(tmp_path)] == ["ok"]
    assert list(line_end_checks(tmp_path / "on_machine")) == []  # an installed package has no scripts


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home)
    lay_out_catalog(home)
    with SkyWorker(env, ROOT) as running:
        yield running


@pytest.mark.parametrize("request_name", ["CLUSTER_LAUNCH", "JOBS_LAUNCH"])
def test_a_launch_with_windows_scripts_is_refused_in_one_line(
    worker: SkyWorker, tmp_path: Path, request_name: str
) -> None:
    """The Windows file is sourced by the script that the task names."""
    for folder in ("on_machine", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    task = yaml.safe_load((ROOT / "sky" / "train_t4.yaml").read_text(encoding="utf-8")) | {"workdir": str(tmp_path)}
    assert "error" not in worker.ask("optimize", task, policy=POLICY, request=request_name)
    to_windows(tmp_path / "on_machine" / "common.sh")
    answer = worker.ask("optimize", task, policy=POLICY, request=request_name)
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", "launch.windows_line_ends")
    said = answer["message"]
    assert "on_machine/common.sh: Windows line ends (CR LF)" in said
    assert r"with sed -i 's/\r$//' on_machine/common.sh" in said
    to_windows(tmp_path / "on_machine" / "room.sh")
    assert (
        "on_machine/common.sh, on_machine/room.sh"
        in worker.ask("optimize", task, policy=POLICY, request=request_name)["message"]
    )


def test_a_windows_task_file_is_the_same_task(worker: SkyWorker, tmp_path: Path) -> None:
    """Including its commands, which become scripts on the machine, also multi-line ones."""
    text = (ROOT / "sky" / "train_t4.yaml").read_text(encoding="utf-8")
    text = text.replace("run: bash on_machine/train.sh", "run: |\n  set -e\n  bash on_machine/train.sh")
    assert "run: |" in text
    unix, windows = tmp_path / "unix.yaml", tmp_path / "windows.yaml"
    for path in (unix, windows):
        path.write_text(text, encoding="utf-8")
    to_windows(windows)
    answers = [worker.ask("optimize", path, policy=POLICY, request="CLUSTER_LAUNCH") for path in (unix, windows)]
    assert "error" not in answers[0], answers[0]
    assert answers[0]["sent"] == answers[1]["sent"]
    assert "\r" not in json.dumps(answers[1]["sent"])


# --- a user's own files


def test_a_windows_config_is_the_same_run(tmp_path: Path) -> None:
    for source in sorted((ROOT / "configs").rglob("*.yaml")):
        copy = to_windows(Path(shutil.copy(source, tmp_path)))
        assert b"\r\n" in copy.read_bytes()
        assert to_dict(load_config(copy)) == to_dict(load_config(source))


def test_windows_records_are_the_same_records(tmp_path: Path) -> None:
    unix = write_jsonl(tmp_path / "unix.jsonl", [row(n) for n in range(3)])
    windows = to_windows(Path(shutil.copy(unix, tmp_path / "windows.jsonl")))
    assert read_records(windows) == read_records(unix)


def test_a_windows_schema_is_the_same_schema(tmp_path: Path) -> None:
    ask = pytest.importorskip("finetune.evaluation.ask", exc_type=ImportError)
    text = "-- a shop\nCREATE TABLE item (\n  id INTEGER, -- its number\n  name TEXT\n);\nCREATE TABLE shop (id INTEGER);\n"
    unix, windows = tmp_path / "unix.sql", tmp_path / "windows.sql"
    for path in (unix, windows):
        path.write_text(text, encoding="utf-8")
    to_windows(windows)
    assert ask.schema_of(windows) == ask.schema_of(unix)
    assert "\r" not in ask.schema_of(windows)


def test_the_shipped_set_from_windows_files_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    """CSV, SQL and YAML; the hash of the prepared set depends on them."""
    built = []
    for name in ("unix", "windows"):
        folder = tmp_path / name
        shutil.copytree(ROOT / "data", folder, ignore=shutil.ignore_patterns("built", "prepared", "__pycache__"))
        if name == "windows":
            for path in [*folder.rglob("*.csv"), *folder.rglob("*.sql"), *folder.rglob("*.yaml")]:
                to_windows(path)
        subprocess.run([sys.executable, "build.py"], cwd=folder, check=True, capture_output=True)
        built.append(
            {path.name: path.read_bytes() for path in sorted((folder / "built").rglob("*.*")) if path.is_file()}
        )
    assert len(built[0]) == 10
    assert built[0] == built[1]
