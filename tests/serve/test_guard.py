"""Nothing of a backend outlives the server, however the server, the guard or the backend ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.serve import process
from finetune.serve.process import GUARD, GuardedProgram

FAMILY = """
import os, signal, subprocess, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".part", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
if sys.argv[2] == "short":
    sys.exit(7)
time.sleep(600)
"""
"""A backend with a process of its own in another session, as vLLM has one for its engine."""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition: Callable[[], bool], seconds: float = 40.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def family(tmp_path: Path) -> Callable[[str], tuple[subprocess.Popen[bytes], list[int]]]:
    """Starts a guarded family: the guard, and the processes that it has to end. Its folder is tmp_path/private."""

    def start(kind: str) -> tuple[subprocess.Popen[bytes], list[int]]:
        (tmp_path / "private").mkdir()
        pids = tmp_path / "pids"
        words = [sys.executable, "-c", FAMILY, str(pids), kind]
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(tmp_path / "private"), *words], stdin=subprocess.PIPE
        )
        assert until(pids.exists)
        return guard, [int(pid) for pid in pids.read_text().split()]

    return start


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_the_end_of_the_server_ends_all(family: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    guard, pids = family(kind)
    assert all(map(alive, pids))
    guard.stdin.close()  # as the kernel does when the server is killed
    assert guard.wait(30) in (143, 137)
    assert not any(map(alive, pids)) and not (tmp_path / "private").exists()


def test_the_end_of_the_backend_ends_its_children_and_tells_its_code(
    family: Callable[..., Any], tmp_path: Path
) -> None:
    guard, pids = family("short")
    assert guard.wait(30) == 7
    assert not any(map(alive, pids)) and (tmp_path / "private").exists(), "its log is still to be read"
    guard.stdin.close()


def test_sigterm_to_the_guard_ends_all(family: Callable[..., Any]) -> None:
    guard, pids = family("polite")
    guard.terminate()
    guard.wait(30)
    assert not any(map(alive, pids))
    guard.stdin.close()


def test_a_killed_guard_takes_the_backend_with_it(family: Callable[..., Any]) -> None:
    guard, pids = family("polite")
    guard.kill()
    guard.wait(30)
    assert until(lambda: not alive(pids[0]))
    os.kill(pids[1], signal.SIGKILL)  # the one that had left, which the kernel does not know as the backend's
    guard.stdin.close()


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    program = GuardedProgram(["/nowhere/python"], {}, socket=tmp_path / "x.sock", log=tmp_path / "log")
    assert until(lambda: program.code is not None) and program.code == 127
    assert program.last_words() == "/nowhere/python: No such file or directory" and program.address is None
    program.stop()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", ""),
        ("loading\nfinetune: model.name: no folder x\n", "model.name: no folder x"),
        (
            "(EngineCore pid=3) ERROR 11-29 22:40:59 [core.py:1435] RuntimeError: Worker failed\n"
            "(APIServer pid=2) ERROR 11-29 22:40:59 [serving.py:496] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
            "encountered an issue.\n",
            "RuntimeError: Worker failed",
        ),
        (
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\x1b[31m\n",
            "torch.OutOfMemoryError: CUDA out of memory\\x1b[31m",
        ),
    ],
)  # fmt: skip
def test_the_last_words_of_a_backend(tmp_path: Path, log: str, said: str) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    program = GuardedProgram(["/bin/true"], {}, socket=folder / "x.sock", log=folder / "log")
    program.stop()
    folder.mkdir(exist_ok=True)
    (folder / "log").write_text(log)
    assert program.last_words() == said


def test_the_package_is_found_wherever_a_program_starts() -> None:
    given = process.with_package({"PYTHONPATH": "/a", "KEY": "x"})
    assert given == {"PYTHONPATH": f"{process.ROOT}:/a", "KEY": "x", "PYTHONUNBUFFERED": "1"}
    assert "KEY" not in process.worker_environment()
