"""The status of each row of doctor, on machines simulated with stand-in programs, folders and variables."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cloud.gcloud import cli as gcloud_cli
from finetune.doctor import local as local_doctor
from finetune.doctor.check import Check, Need
from finetune.doctor.keys import tracker_checks
from finetune.machine import hardware
from finetune.machine.hardware import DetectedGpu, Driver, Hardware, TorchBuild
from finetune.runtime.credentials import huggingface_token_present, wandb_key_present
from finetune.sql.engines.sqlite import SqlSandbox
from tests.helpers.json_server import JsonHandler, serving

ROOT = Path(__file__).resolve().parents[2]
V100 = DetectedGpu("Tesla V100-SXM2-16GB", 16.0, (7, 0))
T4 = DetectedGpu("Tesla T4", 15.0, (7, 5))
A100 = DetectedGpu("NVIDIA A100-SXM4-40GB", 40.0, (8, 0))
CUDA_13 = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
KEYS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"),
    *("MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_DIR"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "CUDA_VISIBLE_DEVICES"),
)

Program = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """An empty home, no keys, and a PATH with only the stand-ins of program(name, shell script)."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    logins = [name for name in os.environ if name.startswith(("CLOUDSDK_", "GOOGLE_", "GCLOUD_", "SKYPILOT_"))]
    for name in (*KEYS, *logins):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(programs))

    def make(name: str, script: str) -> None:
        path = programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install(name, version, *lines): a distribution that importlib.metadata finds before any real one."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(name: str, version: str, *lines: str) -> None:
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        (folder / "METADATA").write_text(text + "\n")

    return make


def row(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


# packages


def test_every_package_of_the_extras_train_and_cloud_has_a_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["cloud"]]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in wanted}
    rows = {check.name for check in local_doctor.package_checks("train", ROOT)}
    assert len(names) > 10
    assert rows == names | {"Python"}


@pytest.mark.parametrize(
    ("version", "pin", "status"),
    [
        ("2.13.0", "2.13.0", "ok"),
        ("2.13.0+cpu", "2.13.0", "ok"),
        ("2.13.0", None, "ok"),
        ("2.12.0", "2.13.0", "warning"),
        ("2.14.0", "2.13.0", "warning"),
        ("2.14.0", None, "ok"),
        ("2.10.0", "2.13.0", "missing"),
        ("2.10.0", None, "missing"),
        ("not-a-version", None, "missing"),
    ],
)
def test_a_version_is_compared_with_its_minimum_and_then_its_pin(
    install: Callable[..., None], version: str, pin: str | None, status: str
) -> None:
    install("torch", version)
    check = local_doctor.package_check("torch", ">=2.11", pin, "train", "train")
    assert (check.status, check.found) == (status, version)
    assert ("pip install" in check.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("extra", "need", "status"),
    [
        ("", "train", "missing"),
        ("", "cloud", "missing"),
        ("train", "train", "missing"),
        ("train", "all", "missing"),
        ("train", "cloud", "info"),
        ("cloud", "train", "warning"),
        ("cloud", "cloud", "missing"),
        ("cloud", "all", "missing"),
    ],
)
def test_an_absent_package_counts_as_missing_only_where_it_is_needed(extra: str, need: Need, status: str) -> None:
    check = local_doctor.package_check("no-such-package", ">=1", None, extra, need)
    assert (check.status, check.found) == (status, "not installed")
    assert "pip install" in check.advice


def test_pins_are_read_from_the_checkouts_constraints_if_present(install: Callable[..., None], tmp_path: Path) -> None:
    install("finetune-text2sql", "9", "Requires-Python: >=3.11", 'Requires-Dist: Some_Tool>=1; extra == "train"')
    install("some-tool", "1.5")
    assert [check.status for check in local_doctor.package_checks("train", tmp_path)] == ["ok", "ok"]
    (tmp_path / "constraints.txt").write_text("# pinned\nsome.tool==1.6 ; python_version > '3'  # why\n")
    check = row(list(local_doctor.package_checks("train", tmp_path)), "Some_Tool")
    assert (check.status, check.needed) == ("warning", ">=1, pinned 1.6")


def test_a_python_that_is_too_old_is_missing(install: Callable[..., None], tmp_path: Path) -> None:
    install("finetune-text2sql", "9", "Requires-Python: >=99")
    (check,) = local_doctor.package_checks("train", tmp_path)
    assert (check.name, check.status) == ("Python", "missing")
    assert "Python >=99" in check.advice


# SkyPilot


def test_the_folder_of_task_yamls_is_not_taken_for_skypilot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    (tmp_path / "sky").mkdir()
    (tmp_path / "sky" / "train_spot.yaml").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "sky", raising=False)  # an earlier test may have imported SkyPilot
    install("finetune-text2sql", "9", "Requires-Python: >=3", 'Requires-Dist: skypilot>=0.14; extra == "cloud"')

    check = row(list(local_doctor.package_checks("cloud", tmp_path)), "skypilot")
    assert check.status == "missing"
    assert "not installed" in check.found and "only the folder sky/" in check.found
    assert "pip install" in check.advice

    install("skypilot", "0.14.1")  # its metadata remains, its module does not
    check = row(list(local_doctor.package_checks("cloud", tmp_path)), "skypilot")
    assert check.status == "missing" and "install it again" in check.advice


def test_an_installed_skypilot_is_ok_until_the_checkouts_folder_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    (tmp_path / "sky").mkdir()
    module = tmp_path / "site" / "sky" / "__init__.py"
    module.parent.mkdir()
    module.write_text("raise AssertionError('imported, which takes seconds')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "sky", raising=False)  # an earlier test may have imported SkyPilot
    install("finetune-text2sql", "9", "Requires-Python: >=3", 'Requires-Dist: skypilot>=0.14; extra == "cloud"')
    install("skypilot", "0.14.1")
    assert row(list(local_doctor.package_checks("cloud", tmp_path)), "skypilot").status == "ok"

    (tmp_path / "sky" / "__init__.py").touch()
    check = row(list(local_doctor.package_checks("cloud", tmp_path)), "skypilot")
    assert check.status == "missing" and "delete sky/__init__.py" in check.advice


# GPU


@pytest.mark.parametrize(
    ("torch", "driver", "failing"),
    [
        (TorchBuild("13.0", A100, CUDA_13), Driver("580.65.06", A100), {}),
        (TorchBuild("13.0", A100, CUDA_13), None, {}),
        (TorchBuild("12.6", V100, ("sm_70", "sm_80")), Driver("535.183.01", V100), {}),
        (TorchBuild("12.6", DetectedGpu("L4", 22.0, (8, 9)), ("sm_80", "sm_90")), Driver("550.1", A100), {}),
        (TorchBuild("12.6", DetectedGpu("B200", 180.0, (10, 0)), ("sm_90", "compute_90")), Driver("570.1", A100), {}),
        (
            TorchBuild("12.6", DetectedGpu("B200", 180.0, (10, 0)), ("sm_90",)),
            Driver("570.1", A100),
            {"torch": "sm_100"},
        ),
        (TorchBuild(None), Driver("580.65.06", T4), {"torch": "install a CUDA build"}),
        (TorchBuild(None), Driver("535.183.01", V100), {"torch": "CUDA 12.6"}),
        (TorchBuild("13.0", V100, CUDA_13), Driver("580.65.06", V100), {"torch": "CUDA 12.6"}),
        (TorchBuild("13.0"), Driver("535.183.01", V100), {"torch": "CUDA 12.6", "driver": "580"}),
        (TorchBuild("13.0"), Driver("550.54.15", A100), {"torch": "the driver", "driver": "580"}),
        (TorchBuild(None, broken="libcudart.so.13: missing"), Driver("580.1", A100), {"torch": "again"}),
        (TorchBuild("13.0"), Driver("", None), {"driver": "to see why"}),
        (TorchBuild(None), None, {}),
        (None, Driver("580.65.06", A100), {}),
    ],
)
def test_gpu_driver_and_torch_build_must_fit_together(
    torch: TorchBuild | None, driver: Driver | None, failing: dict[str, str]
) -> None:
    gpu = torch.gpu if torch else None
    machine = Hardware("Linux", "cpu", 2, 16.0, gpu, hardware.dtype_for(gpu.compute_capability if gpu else None))
    checks = list(local_doctor.gpu_checks("train", machine, driver, torch))
    found = {check.name: check.advice for check in checks if check.status in ("missing", "warning")}
    assert set(found) == {{"torch": "torch build", "driver": "NVIDIA driver"}[name] for name in failing}
    for advice in failing.values():
        assert any(advice in text for text in found.values())


def test_a_cpu_build_of_torch_with_an_nvidia_gpu_matters_for_training_only() -> None:
    machine = Hardware("Linux", "cpu", 2, 16.0, None, "float32")
    train = local_doctor.gpu_checks("train", machine, Driver("580.65.06", T4), TorchBuild(None))
    cloud = local_doctor.gpu_checks("cloud", machine, Driver("580.65.06", T4), TorchBuild(None))
    assert row(list(train), "torch build").status == "missing"
    assert row(list(cloud), "torch build").status == "info"


def test_a_gpu_hidden_by_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = Hardware("Linux", "cpu", 2, 16.0, None, "float32")
    checks = list(local_doctor.gpu_checks("train", machine, Driver("580.65.06", A100), TorchBuild("13.0")))
    assert row(checks, "torch build").advice == "unset CUDA_VISIBLE_DEVICES"


def test_a_laptop_without_gpu_is_info_only() -> None:
    machine = Hardware("macOS", "Apple M3", 8, 16.0, None, "float32")
    checks = list(local_doctor.gpu_checks("train", machine, None, TorchBuild(None)))
    assert row(checks, "GPU").status == "info"
    assert row(checks, "compute dtype").found == "float32"
    assert local_doctor.exit_code(checks) == 0


def test_a_gpu_that_cannot_be_started_is_a_row_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    checks = local_doctor.examine()
    assert "devices are busy" in row(checks, "torch build").found
    assert local_doctor.exit_code(checks) == 1


# machine


@pytest.mark.parametrize(
    ("free_gib", "need", "status"),
    [
        (100, "train", "ok"),
        (10, "train", "warning"),
        (1, "train", "missing"),
        (10, "cloud", "ok"),
        (1, "cloud", "info"),
    ],
)
def test_free_disk_is_compared_with_what_a_run_writes(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, need: Need, status: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * 2**30))
    checks = list(local_doctor.machine_checks(need, Hardware("Linux", "cpu", 2, 16.0, None, "float32")))
    assert [check.status for check in checks if check.name.startswith("disk")] == [status, status]


@pytest.mark.parametrize(
    ("layers", "status", "found"),
    [
        (("Landlock 7", "seccomp"), "ok", "Landlock 7 on, seccomp on"),
        (("seccomp",), "info", "seccomp on, Landlock off"),
        ((), "info", "Landlock off, seccomp off"),
    ],
)
def test_the_second_layer_of_the_sql_sandbox_is_on_or_off(
    layers: tuple[str, ...], status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqlSandbox, "second_layer", lambda _: layers)
    [check] = local_doctor.sandbox_checks()
    assert (check.name, check.status, check.found) == ("SQL sandbox", status, found)
    assert bool(check.advice) == (status != "ok")


def test_a_sql_sandbox_that_does_not_start_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.sql.engines.sqlite_process.START_WORKER", "no python {!r}")
    [check] = local_doctor.sandbox_checks()
    assert (check.status, check.found) == ("warning", "does not start") and "import sqlite3" in check.advice


def test_little_memory_is_a_warning() -> None:
    checks = list(local_doctor.machine_checks("train", Hardware("Linux", "cpu", 2, 3.8, None, "float32")))
    assert row(checks, "RAM").status == "warning"


# keys


def test_keys_are_found_in_the_environment_and_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    assert not huggingface_token_present() and not wandb_key_present()

    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("")
    assert not huggingface_token_present()
    (home / ".cache" / "huggingface" / "token").write_text("hf_x")
    assert huggingface_token_present()

    (home / ".netrc").write_text("machine example.com\n  login me\n  password secret\n")
    assert not wandb_key_present()
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert wandb_key_present()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com/path")
    assert not wandb_key_present()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert wandb_key_present()


def test_a_tracker_has_a_row_where_the_environment_names_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(tracker_checks())
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/private-space")

    class WantsLogin(JsonHandler):
        def answer(self) -> tuple[int, Any]:
            return (401 if self.path == "/health" else 500), {}

    with serving(WantsLogin) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//me:secret@") + "/")
        checks = list(tracker_checks())
    assert [(check.name, check.status) for check in checks] == [("MLflow", "ok"), ("Trackio", "ok")]
    [down, _] = tracker_checks()
    assert (down.status, down.found) == ("warning", "its server does not answer")
    table = local_doctor.render([*checks, down])
    assert "private-space" not in table and url not in table
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert next(tracker_checks()).status == "ok"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [mlflow, trackio] = tracker_checks()
    assert (mlflow.found, trackio.found) == ("not installed", "not installed")
    assert "[mlflow]" in mlflow.advice and "[trackio]" in trackio.advice


@pytest.mark.parametrize("address", ["http://", "http://[::1", "https://127.0.0.1:1", "http://a b"])
def test_an_address_of_a_tracker_that_is_none_is_no_traceback(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    [row] = tracker_checks()
    assert row.status == "warning"


def test_a_broken_netrc_is_not_a_key_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai password\n  junk junk\n")
    assert not wandb_key_present()


def test_no_secret_nor_a_part_of_one_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    secrets = {"HF_TOKEN": "hf_QwErTyUiOpAsDf", "WANDB_API_KEY": "0123456789abcdef7777"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai login user password NetrcSecretValue\n")
    program("gcloud", 'case "$*" in *auth*) echo jane.roe@example.com;; *) echo my-project;; esac')
    checks = local_doctor.examine("all")
    table = local_doctor.render(checks)
    assert row(checks, "Hugging Face token").found == row(checks, "W&B key").found == "present"
    for secret in [*secrets.values(), "NetrcSecretValue", "jane.roe"]:
        assert not [piece for piece in (secret[i : i + 5] for i in range(len(secret) - 4)) if piece in table]
    assert "j...@example.com" in table and "my-project" in table


def test_a_gcloud_or_nvidia_smi_that_hangs_does_not_hang_doctor(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcloud_cli, "SECONDS", 0.3)
    monkeypatch.setattr(hardware, "NVIDIA_SMI_SECONDS", 0.3)
    program("gcloud", "/bin/sleep 60")
    program("nvidia-smi", "/bin/sleep 60")
    start = time.monotonic()
    checks = local_doctor.examine("cloud")
    assert time.monotonic() - start < 10
    assert row(checks, "gcloud login").found == row(checks, "gcloud project").found == "no answer"
    assert row(checks, "NVIDIA driver").status == "warning"
    assert local_doctor.exit_code(checks) == 1


# the table


def test_every_failing_row_says_what_to_do_and_the_exit_code_follows_the_need() -> None:
    for need in ("train", "cloud", "all"):
        checks = local_doctor.examine(need)
        assert all(check.advice for check in checks if check.status in ("missing", "warning"))
        assert len({check.name for check in checks}) == len(checks)
        missing = [check for check in checks if check.status == "missing"]
        assert local_doctor.exit_code(checks) == (1 if missing else 0)
        if need != "train":
            assert "gcloud" in {check.name for check in missing}


def test_the_table_is_aligned_and_ends_with_a_summary() -> None:
    checks = [
        Check("Python", "ok", "3.11.7", ">=3.11"),
        Check("a longer name", "missing", "nothing", "something", "do this"),
    ]
    assert local_doctor.render(checks).splitlines() == [
        "         check          found    needed",
        "ok       Python         3.11.7   >=3.11",
        "missing  a longer name  nothing  something",
        "         -> do this",
        "",
        "1 missing",
    ]
    assert local_doctor.render(checks[:1]).endswith("nothing required is missing")


def test_of_the_heavy_packages_only_torch_is_imported() -> None:
    program = (
        "import sys; from finetune.doctor.local import examine, render; render(examine('all')); "
        "heavy = {'transformers', 'trl', 'peft', 'bitsandbytes', 'datasets', 'wandb', 'sky'}; "
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
