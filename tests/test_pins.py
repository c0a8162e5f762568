"""The pinned packages and the set-up: for every Python that the project allows, and with signs of life."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from select import select

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from finetune.doctor.local import pinned_versions

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "3.11.0"


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **variables}
    )


def test_every_pinned_package_runs_on_the_oldest_python_that_is_allowed() -> None:
    """pip says of one that does not only that versions conflict."""
    wants = importlib.metadata.metadata("finetune-text2sql")["Requires-Python"]
    assert SpecifierSet(wants).contains(OLDEST)
    looked_at, refused = 0, []
    for name, version in pinned_versions(ROOT / "constraints.txt").items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(found.version).public != Version(version).public:
            continue
        looked_at += 1
        if not SpecifierSet(found.metadata["Requires-Python"] or "").contains(OLDEST):
            refused.append(f"{name} {version}")
    assert looked_at > 150 and refused == []


def test_a_finished_environment_is_kept_and_an_unfinished_one_of_another_python_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    make = ["bash", ROOT / "dev/venv.sh", sys.executable, folder]
    assert "creating" in run(*make).stdout
    assert run(*make).stdout == "", "unfinished, and of this Python"
    other = folder / "bin" / "python"
    other.unlink()
    other.write_text("#!/bin/sh\necho 3.11.2\n")
    other.chmod(0o755)
    (folder / ".ready").touch()
    assert run(*make).stdout == "", "finished: another Python is no reason"
    (folder / ".ready").unlink()
    assert "unfinished, and of Python 3.11.2" in run(*make).stdout
    assert "3.11.2" not in run(other, "--version").stdout


def test_a_long_set_up_gives_signs_of_life_and_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    ignoring = ("bash", "-c", 'trap "" TERM; exec "$@"', "-")  # as what started this may do
    script = ("bash", ROOT / "dev/with_signs_of_life.sh", tmp_path, "sh", "-c", "sleep 2; exit 7")
    done = run(*ignoring, *script, SIGN_SECONDS="0.5")
    assert done.returncode == 7 and "set-up: 4 MB in" in done.stdout.replace("3 MB", "4 MB")


def test_the_signs_of_life_end_with_their_script_even_where_it_is_killed(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "dev/with_signs_of_life.sh"), str(tmp_path), "sleep", "1"]
    environment, until = os.environ | {"SIGN_SECONDS": "0.3"}, time.monotonic() + 10
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and "set-up: " in process.stdout.readline()
        process.kill()
        process.wait()
        while select([process.stdout], [], [], 3.0)[0] and process.stdout.readline():
            assert time.monotonic() < until, "goes on without its script"
