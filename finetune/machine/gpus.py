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
    machine: its Google Cloud machine type in our tasks; "" if no launches are planned on it.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_gib: float
    tflops: float
    bandwidth: float
    machine: str = ""

    @property
    def dtype(self) -> str:
        return dtype_for(self.compute_capability)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuSpec("T4", (7, 5), 14.5, 65.0, 320.0, "n1-highmem-8"),
        GpuSpec("V100", (7, 0), 15.7, 125.0, 900.0, "n1-highmem-8"),
        GpuSpec("L4", (8, 9), 22.0, 121.0, 300.0, "g2-standard-8"),
        GpuSpec("A100", (8, 0), 39.4, 312.0, 1555.0, "a2-highgpu-1g"),
        GpuSpec("A100-80GB", (8, 0), 79.2, 312.0, 2039.0, "a2-ultragpu-1g"),
        GpuSpec("H100", (9, 0), 79.1, 989.0, 3350.0),
    )
}
"""Memory as CUDA reports it, rounded down (H100: measured; the others: from out-of-memory messages in public issues). N1 hosts
T4 and V100 with 8 vCPU and 52 GB; an A100 comes only with its own a2 machine, an L4 with g2 (Google's page on GPU machine
types)."""


def known_gpu(name: str, compute_capability: tuple[int, int], memory_gib: float) -> GpuSpec:
    """The entry of GPUS for a GPU with this CUDA name. If there is none: of the same or the next older generation, the one with
    the nearest memory, whose speed is the best guess."""
    words = name.upper().replace("-", " ").split()
    named = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] in words]
    generations = {gpu.compute_capability for gpu in GPUS.values()}
    nearest = max((each for each in generations if each <= compute_capability), default=min(generations))
    like = named or [gpu for gpu in GPUS.values() if gpu.compute_capability == nearest]
    return min(like, key=lambda gpu: abs(gpu.memory_gib - memory_gib))
