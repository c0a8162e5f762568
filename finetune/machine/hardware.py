"""What machine this is: CPU, memory, GPU and the dtype that follows. run.json records it, `doctor` checks it."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
NVIDIA_SMI_SECONDS = 5.0
TURING = (7, 5)
GROWING_SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Environment that lets torch's CUDA allocator grow its segments; PYTORCH_ALLOC_CONF is the newer name of the variable."""


@dataclass(frozen=True)
class DetectedGpu:
    """The first GPU of this machine, and how many GPUs there are. memory_gib is the total of one GPU, in GiB.

    The data sheet of its model is a `gpus.GpuSpec`.
    """

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]
    count: int = 1


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi reports; version is "" and gpu None if it is on PATH but gives no usable output."""

    version: str
    gpu: DetectedGpu | None


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for, and the GPU that it finds."""

    cuda: str | None  # CUDA version, None in a CPU build
    gpu: DetectedGpu | None = None  # what it can use
    architectures: tuple[str, ...] = ()  # such as sm_80; empty if no GPU can be used
    broken: str = ""  # the error if it cannot be imported, or finds a GPU but cannot initialise it


@dataclass(frozen=True)
class Hardware:
    """gpu is the one that torch can use, or without torch the one that nvidia-smi lists; dtype is what `auto` means here."""

    platform: str
    cpu: str
    cores: int  # that this process may use
    ram_gib: float
    gpu: DetectedGpu | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def let_segments_grow() -> None:
    """Let torch's CUDA allocator grow its segments, so that micro-batches of varying size cause little fragmentation. Call it
    before the first use of a GPU; the user's own setting is kept."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        for name, value in GROWING_SEGMENTS.items():
            os.environ.setdefault(name, value)


def dtype_for(compute_capability: tuple[int, int] | None, asked: str = "auto") -> str:
    """The compute dtype for a GPU's (major, minor) compute capability; None is a CPU. asked: model.torch_dtype, which wins unless
    it is auto.

    bfloat16 arithmetic starts with Ampere (8.0); `torch.cuda.is_bf16_supported` also says yes to emulation.
    On a CPU float32 is the fastest (measured on two cores: 326 tokens/s, in bfloat16 190).
    """
    if asked != "auto":
        return asked
    if compute_capability is None:
        return "float32"
    return "bfloat16" if compute_capability >= (8, 0) else "float16"


def detect() -> Hardware:
    """Detect this machine's hardware. Imports torch if it is installed, else calls nvidia-smi."""
    found = torch_build() or nvidia_driver()
    gpu = found.gpu if found else None
    return Hardware(
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=usable_cores(),
        ram_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        gpu=gpu,
        dtype=dtype_for(gpu.compute_capability if gpu else None),
    )


def usable_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_build() -> TorchBuild | None:
    """The installed torch; None if it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        return None if error.name == "torch" else TorchBuild(None, broken=str(error))
    except (ImportError, OSError) as error:  # a shared library that is missing or of the wrong CUDA version
        return TorchBuild(None, broken=str(error).splitlines()[0])
    if not torch.cuda.is_available():
        return TorchBuild(torch.version.cuda)
    try:
        first = torch.cuda.get_device_properties(0)
    except RuntimeError as error:
        return TorchBuild(torch.version.cuda, broken=str(error).splitlines()[0])
    memory_gib = round(first.total_memory / GIB, 1)
    gpu = DetectedGpu(first.name, memory_gib, (first.major, first.minor), torch.cuda.device_count())
    return TorchBuild(torch.version.cuda, gpu, tuple(torch.cuda.get_arch_list()))


def runs_on(torch: TorchBuild, capability: tuple[int, int]) -> bool:
    """Whether a CUDA build has code for a GPU: compiled for its generation, or PTX of an older one.

    A build that finds no GPU does not report its architectures. Then only the known gap counts: builds for CUDA 12.8 and later
    start at Turing (7.5).
    """
    if not torch.architectures:
        version = tuple(int(part) for part in (torch.cuda or "0").split(".")[:2])
        return version < (12, 8) or capability >= TURING
    for architecture in torch.architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(filter(str.isdigit, number))
        held = (int(digits[:-1]), int(digits[-1]))
        if held <= capability and (kind == "compute" or held[0] == capability[0]):
            return True
    return False


def nvidia_driver() -> Driver | None:
    """Driver version and GPUs as nvidia-smi reports them, None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "driver_version,memory.total,compute_cap,name"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    lines = (program_output(query, NVIDIA_SMI_SECONDS) or "").splitlines()
    try:
        version, mebibytes, capability, name = (cell.strip() for cell in lines[0].split(",", 3))
        major, minor = capability.split(".")
        gpu = DetectedGpu(name, round(float(mebibytes) / 1024, 1), (int(major), int(minor)), len(lines))
    except (ValueError, IndexError):
        return Driver("", None)
    return Driver(version, gpu)


def program_output(command: list[str], seconds: float) -> str | None:
    """A program's stdout, stripped; None if it is missing, fails, or is killed because it takes longer than `seconds`."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that the kill also reaches the children of a wrapper script
        )
    except OSError:
        return None
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
    return output.decode(errors="replace").strip() if process.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
