"""Hardware detection with fake nvidia-smi and torch, and programs that hang."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.machine import hardware
from finetune.machine.hardware import DetectedGpu, Driver, TorchBuild, program_output


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A PATH that holds only the fakes made by program(name, shell script)."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(None, "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_dtype_follows_compute_capability(capability: tuple[int, int] | None, dtype: str) -> None:
    assert hardware.dtype_for(capability) == dtype


def test_nvidia_smi_is_read_with_commas_in_names_and_several_gpus(
    program: Callable[[str, str], None],
) -> None:
    program(
        "nvidia-smi",
        "echo '535.183.01, 16384, 7.0, Tesla V100, the old one'; echo '535.183.01, 16384, 7.0, x'",
    )
    gpu = DetectedGpu("Tesla V100, the old one", 16.0, (7, 0), 2)
    assert hardware.nvidia_driver() == Driver("535.183.01", gpu)


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo '580.1, [N/A], [N/A], x'", "true"])
def test_an_nvidia_smi_without_output_is_a_driver_without_version(
    program: Callable[[str, str], None], script: str
) -> None:
    program("nvidia-smi", script)
    assert hardware.nvidia_driver() == Driver("", None)


def test_without_nvidia_smi_there_is_no_driver() -> None:
    assert hardware.nvidia_driver() is None


def test_torchs_gpu_is_read_with_memory_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    gpu = DetectedGpu("Tesla T4", 15.0, (7, 5), 2)
    assert hardware.torch_build() == TorchBuild("13.0", gpu, ("sm_75",))
    machine = hardware.detect()
    assert (machine.gpu, machine.dtype) == (gpu, "float16")
    assert json.loads(json.dumps(machine.to_dict()))["gpu"]["compute_capability"] == [7, 5]


def test_without_torch_the_gpu_comes_from_nvidia_smi(
    program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ModuleNotFoundError
    program("nvidia-smi", "echo '580.65.06, 40960, 8.0, NVIDIA A100-SXM4-40GB'")
    assert hardware.torch_build() is None
    machine = hardware.detect()
    assert machine.gpu == DetectedGpu("NVIDIA A100-SXM4-40GB", 40.0, (8, 0))
    assert machine.dtype == "bfloat16"


def test_the_machine_is_described_in_json() -> None:
    values = json.loads(json.dumps(hardware.detect().to_dict()))
    assert set(values) == {"platform", "cpu", "cores", "ram_gib", "gpu", "dtype"}
    assert values["cores"] >= 1 and values["ram_gib"] > 0.1 and values["cpu"]


@pytest.mark.parametrize(("script", "output"), [("echo ' yes '", "yes"), ("echo yes; exit 3", None), ("true", "")])
def test_a_programs_output_counts_if_it_succeeds(
    program: Callable[[str, str], None], script: str, output: str | None
) -> None:
    program("stand-in", script)
    assert program_output(["stand-in"], 5) == output


def test_a_program_that_is_missing_has_no_output() -> None:
    assert program_output(["stand-in"], 5) is None


def test_a_program_that_hangs_is_killed_with_its_children(program: Callable[[str, str], None], tmp_path: Path) -> None:
    late = tmp_path / "late"
    program("stand-in", f"(/bin/sleep 1; : > {late}) & wait")
    start = time.monotonic()
    assert program_output(["stand-in"], 0.3) is None
    time.sleep(max(0.0, start + 1.5 - time.monotonic()))
    assert not late.exists()
