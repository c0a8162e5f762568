"""The GPUs that a run can be planned for: SkyPilot's names, memory, compute rates, and their machine types.

Imports no torch, so that a laptop that only plans can use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.machine.hardware import dtype_for


@dataclass(frozen=True)
class GpuSpec:
    """One GPU model, from its data sheet. The GPU of this machine is a `hardware.DetectedGpu`.

    memory_gib: the total that CUDA reports, in GiB, which is less than the name says (ECC and the driver's share).
    tflops: peak dense matrix rate in the 16-bit type that training uses, TFLOP/s, from NVIDIA's data sheets.
    bandwidth: memory bandwidth in GB/s, from the same.
    called: its name in nvidia-smi, where that has other words than ours.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_gib: float
    tflops: float
    bandwidth: float
    called: str = ""

    @property
    def dtype(self) -> str:
        return dtype_for(self.compute_capability)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of its name in nvidia-smi, in capitals."""
        return tuple((self.called or self.name.replace("-", " ")).upper().split())


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuSpec("T4", (7, 5), 14.5, 65.0, 320.0),
        GpuSpec("V100", (7, 0), 15.7, 125.0, 900.0),
        GpuSpec("L4", (8, 9), 22.0, 121.0, 300.0),
        GpuSpec("A100", (8, 0), 39.4, 312.0, 1555.0),
        GpuSpec("A100-80GB", (8, 0), 79.2, 312.0, 2039.0),
        GpuSpec("H100", (9, 0), 79.1, 989.0, 3350.0),
        GpuSpec("H200", (9, 0), 139.8, 989.0, 4800.0),
        GpuSpec("RTXPRO6000", (12, 0), 94.9, 500.0, 1597.0, "RTX PRO 6000"),
        GpuSpec("B200", (10, 0), 178.0, 2250.0, 8000.0),
    )
}
"""Memory as CUDA reports it, rounded down. H100 and H200: measured. T4 to A100-80GB: from out-of-memory messages in public
issues. RTXPRO6000: nvidia-smi lists 97,887 MiB (public reports), B200: 179 GiB (Vultr's overview of HGX B200), each less a GiB
for the driver, assumed from the H100, where nvidia-smi lists half a GiB more than CUDA.

RTXPRO6000 is the Server Edition of the RTX PRO 6000 Blackwell: its data sheet has 4,000 TOPS in FP4 with sparsity, an eighth of
which is the dense rate in 16 bits. B200: 2,250 TFLOP/s in an HGX board at 1,000 W."""


@dataclass(frozen=True)
class GpuMachine:
    """A machine type of Google Cloud with its GPUs, as our tasks use it."""

    gpu: GpuSpec
    count: int
    machine: str

    @property
    def name(self) -> str:
        """As in `plan.gpus` and in tables: L4, or L4:2 for two in one machine."""
        return machine_name(self.gpu.name, self.count)

    @property
    def accelerators(self) -> str:
        """As in a task of SkyPilot: L4:1."""
        return f"{self.gpu.name}:{self.count}"


def machine_name(gpu: str, count: int) -> str:
    """The name of `count` GPUs in one machine: L4 for one, L4:2 for two."""
    return gpu if count == 1 else f"{gpu}:{count}"


MACHINES = {
    machine.name: machine
    for machine in (
        GpuMachine(GPUS["A100"], 1, "a2-highgpu-1g"),
        GpuMachine(GPUS["L4"], 1, "g2-standard-8"),
        GpuMachine(GPUS["T4"], 1, "n1-highmem-8"),
        GpuMachine(GPUS["V100"], 1, "n1-highmem-8"),
        GpuMachine(GPUS["H100"], 1, "a3-highgpu-1g"),
        GpuMachine(GPUS["A100-80GB"], 1, "a2-ultragpu-1g"),
        GpuMachine(GPUS["RTXPRO6000"], 1, "g4-standard-48"),
        GpuMachine(GPUS["L4"], 2, "g2-standard-24"),
        GpuMachine(GPUS["L4"], 4, "g2-standard-48"),
        GpuMachine(GPUS["T4"], 2, "n1-highmem-8"),
        GpuMachine(GPUS["T4"], 4, "n1-highmem-16"),
        GpuMachine(GPUS["H200"], 8, "a3-ultragpu-8g"),
        GpuMachine(GPUS["B200"], 8, "a4-highgpu-8g"),
    )
}
"""Google's page on GPU machine types, as in SkyPilot 0.14 (finetune/cloud/catalog/machine_types.py, which a test compares with
SkyPilot's own table): an A100 comes only with a2, an L4 with g2, an H100 and H200 with a3, an RTX PRO 6000 with g4, a B200 with
a4, the last two and the H200 in fixed numbers. N1 hosts T4 and V100: 8 vCPU and 52 GB, for four T4 16 and 104."""


def known_gpu(name: str, compute_capability: tuple[int, int], memory_gib: float) -> GpuSpec:
    """The entry of GPUS for a GPU with this CUDA name. If there is none: of the same or the next older generation, the one with
    the nearest memory, whose speed is the best guess."""
    words = name.upper().replace("-", " ").split()
    named = [gpu for gpu in GPUS.values() if set(_model(gpu)) <= set(words)]
    generations = {gpu.compute_capability for gpu in GPUS.values()}
    nearest = max((each for each in generations if each <= compute_capability), default=min(generations))
    like = named or [gpu for gpu in GPUS.values() if gpu.compute_capability == nearest]
    return min(like, key=lambda gpu: abs(gpu.memory_gib - memory_gib))


def _model(gpu: GpuSpec) -> tuple[str, ...]:
    """Its words without the size of its memory: A100 of A100-80GB."""
    return tuple(word for word in gpu.words if not word.endswith("GB"))
