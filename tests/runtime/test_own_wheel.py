"""The wheel that is built back from what is installed: pip takes it, and it is the same each time."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest

from finetune.runtime import installed, own_wheel
from tests.helpers.errors import raises

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, content = own_wheel.own_wheel()
    path = tmp_path_factory.mktemp("wheel") / name
    path.write_bytes(content)
    return path


def test_it_holds_the_package_the_project_files_and_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = message_from_bytes(archive.read("finetune_text2sql-0.1.0.dist-info/METADATA"))
        assert archive.read("finetune/project/sky/train_a100.yaml") == (ROOT / "sky/train_a100.yaml").read_bytes()
        assert b"finetune.cli.main:main" in archive.read("finetune_text2sql-0.1.0.dist-info/entry_points.txt")
    assert {
        "finetune/cli/main.py",
        "finetune/report/templates/report.html.j2",
        "finetune/project/constraints.txt",
    } <= names
    assert not any("__pycache__" in name for name in names)
    assert about["Name"] == "finetune-text2sql" and "torch" in " ".join(about.get_all("Requires-Dist") or [])


def test_it_is_the_same_each_time_and_knows_itself(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_wheel.own_wheel() == (wheel.name, wheel.read_bytes())
    assert own_wheel.is_own_wheel(wheel)
    (tmp_path / "broken.whl").write_bytes(b"no wheel")
    assert not own_wheel.is_own_wheel(tmp_path / "broken.whl") and not own_wheel.is_own_wheel(tmp_path / "none.whl")
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "errors.py").write_text("# another version")
    monkeypatch.setattr(own_wheel, "PACKAGE", tmp_path / "finetune")
    assert not own_wheel.is_own_wheel(wheel)


def test_pip_installs_it_and_the_command_runs(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of this environment, because they take a minute."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    [site] = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(str(Path(pytest.__file__).parents[1]))
    program = "import finetune.cli.main as m; print(m.__file__); m.main(['plan', '--help'])"
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(site)) and "finetune plan" in done.stdout


def test_a_program_that_is_not_installed_has_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with raises("install.no_metadata", match="pip install"):
        own_wheel.own_wheel()


def test_what_a_checkout_has_beside_the_package_is_carried() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in installed.carried_files(ROOT)}
    assert {"configs/demo_cpu.yaml", "on_machine/package.sh", "on_machine/kept/hub.py", ".sky.yaml"} < names
