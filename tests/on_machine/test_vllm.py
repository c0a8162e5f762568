"""on_machine/vllm.sh: vLLM's environment is built in the background by set-up, is there whole or not at all, and says why it is
not. uv and the GPU are stand-ins."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from finetune.job.settings import JobSettings, read_settings
from finetune.job.vllm import wait_for_vllm
from tests.helpers.machine_fixture import ROOT, CloudMachine, gone, wait_for
from tests.on_machine.test_setup import WORKING_TORCH, put_torch

UV = f"""\
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
put() {{ printf '%s\\n' '#!/bin/sh' "$2" >"$1" && chmod +x "$1"; }}
case "$*" in
  venv*) for last; do :; done; mkdir -p "$last/bin"; put "$last/bin/python" 'exec {sys.executable} "$@"'; echo "$last" ;;
  *finetune-vllm*)
    echo "$$ ${{UV_TORCH_BACKEND-unset}} $(nice)" >"$CALLS.uv"
    while [ -e "$CALLS.wait" ]; do sleep 0.05; done
    [ -z "${{FAKE_VLLM:-}}" ] || {{ echo "no such version"; exit 1; }} ;;
  pip*) put "$HOME/finetune-env/bin/finetune" true ;;
esac
"""
SMI = """\
#!/usr/bin/env bash
case $1 in
  *compute_cap) echo "{capability}" ;;
  *driver_version) echo "{driver}" ;;
  *name) echo "NVIDIA L4" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    """With an L4, a driver for CUDA 13, and packages that are installed at once."""
    machine = CloudMachine(tmp_path)
    (machine.checkout / "on_machine").mkdir(parents=True)
    for name in (
        "on_machine/setup.sh", "on_machine/package.sh", "on_machine/vllm.sh", "on_machine/vllm-constraints.txt",
        "constraints.txt", "pyproject.toml",
    ):  # fmt: skip
        shutil.copyfile(ROOT / name, machine.checkout / name)
    machine.program(machine.home / ".local" / "bin", "uv", UV)
    machine.env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FINETUNE_VLLM_GIB": "0"}
    put_gpu(machine)
    put_torch(machine, WORKING_TORCH)
    put_vllm(machine)
    return machine


def put_gpu(machine: CloudMachine, capability: str = "8.9", driver: str = "580.95.05") -> None:
    machine.program(machine.folder / "bin", "nvidia-smi", SMI.format(capability=capability, driver=driver))


def put_vllm(machine: CloudMachine, module: str = "__version__ = '0.24.0'") -> None:
    (machine.folder / "site" / "vllm.py").write_text(module, encoding="utf-8")


def set_up(machine: CloudMachine, **env: str) -> str:
    code, said = machine.run("setup.sh", **env)
    assert code == 0, said
    return said


def settings(machine: CloudMachine) -> JobSettings:
    return read_settings({"HOME": str(machine.home), "VLLM_MINUTES": "1"})


def comes(machine: CloudMachine) -> bool:
    return wait_for_vllm(settings(machine), 60.0)


def missing(machine: CloudMachine) -> str:
    return (machine.home / ".finetune" / "vllm.missing").read_text()


def python(machine: CloudMachine) -> Path:
    return machine.home / "finetune-vllm" / "bin" / "python"


def test_set_up_does_not_wait_and_the_environment_comes(
    machine: CloudMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine.folder / "calls.wait").touch()
    said = set_up(machine, UV_TORCH_BACKEND="cu126")
    assert "vLLM's environment is built in the background: ~/.finetune/vllm.log" in said
    wait_for(machine.folder / "calls.uv")
    assert not (machine.home / "finetune-vllm").exists()
    (machine.folder / "calls.wait").unlink()
    assert comes(machine)
    assert capsys.readouterr().err.startswith("machine: waiting up to 1.0 minutes for vLLM's environment")
    part = machine.home / "finetune-vllm.part"
    assert machine.calls()[-2:] == [
        f"venv --quiet --relocatable --python 3.11 {part}",
        f"pip install --python {part}/bin/python --constraints on_machine/vllm-constraints.txt vllm --editable .",
    ]
    assert not part.exists()
    _, torch, niceness = (machine.folder / "calls.uv").read_text().split()
    assert (torch, niceness) == ("unset", "19"), "vLLM's torch is not that of training, and training goes first"


def test_a_project_of_init_gets_its_wheel_there_too(machine: CloudMachine) -> None:
    folder = machine.checkout / "on_machine"
    (machine.checkout / "pyproject.toml").unlink()
    (machine.checkout / "constraints.txt").rename(folder / "constraints.txt")
    (folder / "finetune_text2sql-0.1.0-py3-none-any.whl").write_bytes(b"wheel")
    set_up(machine)
    assert comes(machine)
    part = machine.home / "finetune-vllm.part"
    assert machine.calls()[-1] == (
        f"pip install --python {part}/bin/python --constraints on_machine/vllm-constraints.txt vllm "
        "--reinstall-package finetune-text2sql on_machine/finetune_text2sql-0.1.0-py3-none-any.whl"
    )
    assert "finetune-vllm is up to date" in set_up(machine)
    (folder / "finetune_text2sql-0.1.0-py3-none-any.whl").write_bytes(b"another")
    assert "is built in the background" in set_up(machine)


def test_it_outlives_the_set_up_and_everything_that_set_up_has_started(machine: CloudMachine) -> None:
    (machine.folder / "calls.wait").touch()
    process = machine.start("setup.sh")
    _, said = process.communicate(timeout=60)  # its pipes are closed, too
    assert process.returncode == 0, said
    wait_for(machine.folder / "calls.uv")
    builder = int((machine.folder / "calls.uv").read_text().split()[0])
    assert os.getsid(builder) != process.pid
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    (machine.folder / "calls.wait").unlink()
    assert comes(machine)


def test_a_second_set_up_builds_nothing_until_something_changes(machine: CloudMachine) -> None:
    set_up(machine)
    assert comes(machine)
    calls = len(machine.calls())
    assert "finetune-vllm is up to date" in set_up(machine)
    assert len(machine.calls()) == calls
    with (machine.checkout / "on_machine" / "vllm-constraints.txt").open("a") as file:
        file.write("# changed\n")
    old = python(machine).stat().st_ino
    set_up(machine)
    wait_until_free(machine)
    assert len(machine.calls()) == calls + 2 and python(machine).stat().st_ino != old
    assert not (machine.home / "finetune-vllm.old").exists()


def wait_until_free(machine: CloudMachine) -> None:
    """Until nobody builds."""
    with (machine.home / ".finetune" / "vllm.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_two_set_ups_build_it_once(machine: CloudMachine) -> None:
    (machine.folder / "calls.wait").touch()
    set_up(machine)
    wait_for(machine.folder / "calls.uv")
    assert "vLLM's environment is being built already" in set_up(machine)
    (machine.folder / "calls.wait").unlink()
    assert comes(machine)
    assert len([call for call in machine.called("pip") if "finetune-vllm" in call]) == 1


@pytest.mark.parametrize("fault", ["FAKE_VLLM", "import"])
def test_a_build_that_fails_leaves_nothing_says_why_and_is_tried_again(
    machine: CloudMachine, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "import":
        put_vllm(machine, "raise ImportError('libcudart.so.13')")
    set_up(machine, **({"FAKE_VLLM": "1"} if fault != "import" else {}))
    assert not comes(machine)
    why = "it was installed, but cannot be imported" if fault == "import" else "its packages could not be installed"
    assert f"machine: without vLLM: {why} (see ~/.finetune/vllm.log)\n" in capsys.readouterr().err
    log = (machine.home / ".finetune" / "vllm.log").read_text()
    assert ("libcudart.so.13" if fault == "import" else "no such version") in log
    assert not list(machine.home.glob("finetune-vllm*"))
    put_vllm(machine)
    set_up(machine, FAKE_VLLM="")
    assert comes(machine) and not (machine.home / ".finetune" / "vllm.missing").exists()


def test_a_build_that_is_killed_leaves_no_environment_and_the_next_one_begins_again(machine: CloudMachine) -> None:
    (machine.folder / "calls.wait").touch()
    set_up(machine)
    wait_for(machine.folder / "calls.uv")
    builder = int((machine.folder / "calls.uv").read_text().split()[0])
    os.killpg(os.getpgid(builder), signal.SIGKILL)
    assert gone(builder)
    assert not comes(machine), "the lock is free: nobody is waited for"
    (machine.folder / "calls.wait").unlink()
    set_up(machine)
    assert comes(machine)


@pytest.mark.parametrize(
    ("capability", "driver", "env", "why"),
    [
        ("7.5", "580.95.05", {}, "it is not built for a NVIDIA L4, whose compute capability, 7.5, is below 8.0"),
        ("7.0", "580.95.05", {}, "it is not built for a NVIDIA L4, whose compute capability, 7.0, is below 8.0"),
        ("8.9", "535.86.10", {}, "it needs a driver for CUDA 13 (580 or newer), and this one is 535.86.10"),
        ("8.9", "580.95.05", {"FINETUNE_ALLOW_CPU": "1"}, "this machine may have no GPU (FINETUNE_ALLOW_CPU=1)"),
        ("8.9", "580.95.05", {"FINETUNE_VLLM_BUILD": "0"}, "its environment is not built (FINETUNE_VLLM_BUILD=0)"),
    ],
)
def test_where_it_does_not_run_it_is_not_built(
    machine: CloudMachine,
    capability: str,
    driver: str,
    env: dict[str, str],
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_gpu(machine, capability, driver)
    set_up(machine, **env)
    began = time.monotonic()
    assert not comes(machine)
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == f"machine: without vLLM: {why}\n"
    assert not [call for call in machine.calls() if "finetune-vllm" in call]


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0", "12.0"])
def test_it_is_built_for_every_newer_gpu(machine: CloudMachine, capability: str) -> None:
    put_gpu(machine, capability)
    set_up(machine)
    assert comes(machine)


def test_a_disk_that_is_too_full_is_named(machine: CloudMachine) -> None:
    set_up(machine, FINETUNE_VLLM_GIB="999999")
    assert not comes(machine)
    assert "GiB of disk are free, and its environment needs 999999" in missing(machine)
    assert not [call for call in machine.calls() if "finetune-vllm" in call]


def test_without_a_set_up_of_ours_nobody_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert not comes(CloudMachine(tmp_path))


def test_an_environment_of_the_users_own_is_not_waited_for(machine: CloudMachine) -> None:
    assert wait_for_vllm(read_settings({"HOME": str(machine.home), "FINETUNE_VLLM": "/opt/vllm/bin/python"}), 60.0)


def test_the_pinned_versions_are_those_that_were_measured() -> None:
    pinned = (ROOT / "on_machine" / "vllm-constraints.txt").read_text()
    assert "\nvllm==0.24.0\n" in pinned and "\ntorch==2.11.0\n" in pinned
