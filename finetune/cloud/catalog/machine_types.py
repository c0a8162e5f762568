"""Which machine types on Google Cloud have which GPUs. SkyPilot refuses a wrong pair too, but has to be imported for that."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.errors import UserError

_EIGHT = (1, 2, 4, 8)
OWN_MACHINES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "A100": {**{n: (f"a2-highgpu-{n}g",) for n in _EIGHT}, 16: ("a2-megagpu-16g",)},
    "A100-80GB": {n: (f"a2-ultragpu-{n}g",) for n in _EIGHT},
    "L4": {
        1: tuple(f"g2-standard-{vcpus}" for vcpus in (4, 8, 12, 16, 32)),
        2: ("g2-standard-24",),
        4: ("g2-standard-48",),
        8: ("g2-standard-96",),
    },
    "H100": {n: (f"a3-highgpu-{n}g",) for n in _EIGHT},
    "H100-MEGA": {8: ("a3-megagpu-8g",)},
    "H200": {8: ("a3-ultragpu-8g",)},
    "B200": {8: ("a4-highgpu-8g",)},
    "RTXPRO6000": {n: (f"g4-standard-{48 * n}",) for n in _EIGHT},
}
"""GPU -> count -> the machine types that have them built in."""
NOT_ON_DEMAND = frozenset({"a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g", "a3-ultragpu-8g", "a4-highgpu-8g"})
"""Machine types that Google sells as spot and flex-start (or reserved), not on demand, though SkyPilot's catalog has such prices
for them: an H100 on demand comes only with seven others. Google's pages: accelerator-optimized machines, "Consumption option
availability by machine type"; and Cluster Director, "Choose a consumption option", for A3 Ultra and A4."""
N1_LIMITS: Mapping[str, Mapping[int, tuple[int, int]]] = {
    "T4": {1: (48, 312), 2: (48, 312), 4: (96, 624)},
    "V100": {1: (12, 78), 2: (24, 156), 4: (48, 312), 8: (96, 624)},
    "P4": {1: (24, 156), 2: (48, 312), 4: (96, 624)},
    "P100": {1: (16, 104), 2: (32, 208)},
}
"""GPU -> count -> largest N1 machine (vCPUs, GB) to which they can be attached.

Source of both tables: Google's page on GPU machine types, as in SkyPilot 0.14 (catalog/gcp_catalog.py). Four P100 are left out:
their limit depends on the zone.
"""


def check_machine(gpu: str, count: int, machine: str, size: tuple[float, float] | None) -> None:
    """Raise UserError, naming the valid machine types, unless the machine type can have `count` of the GPU.

    gpu: its canonical name. size: (vCPUs, GB) of the machine type, None if it is not in the catalog.
    """
    counts: Mapping[int, object] = OWN_MACHINES.get(gpu) or N1_LIMITS.get(gpu) or {}
    if not counts:
        raise UserError(
            f"{gpu}: its machine types on Google Cloud are not known here; choose another GPU",
            code="cloud.gpu_not_offered",
        )
    if count not in counts:
        known = ", ".join(map(str, counts))
        raise UserError(
            f"{gpu}:{count}: no machine type on Google Cloud has {count} of them; possible: {known}",
            code="cloud.machine_mismatch",
        )
    if not fits(gpu, count, machine, size):
        unknown = machine.startswith("n1-") and size is None
        what = f"machine {machine} is not in the catalog" if unknown else f"{gpu}:{count} does not come with {machine}"
        raise UserError(
            f"{what}; on Google Cloud {gpu}:{count} comes only with {_valid_machines(gpu, count)}",
            code="cloud.machine_mismatch",
        )


def fits(gpu: str, count: int, machine: str, size: tuple[float, float] | None) -> bool:
    """Whether Google Cloud sells the machine type with `count` of the GPU. size: as in `check_machine`."""
    if gpu in OWN_MACHINES:
        return machine in OWN_MACHINES[gpu].get(count, ())
    limit = N1_LIMITS.get(gpu, {}).get(count)
    return bool(limit and size and machine.startswith("n1-") and size[0] <= limit[0] and size[1] <= limit[1])


def _valid_machines(gpu: str, count: int) -> str:
    if gpu in OWN_MACHINES:
        return ", ".join(OWN_MACHINES[gpu][count])
    vcpus, memory = N1_LIMITS[gpu][count]
    return f"an N1 machine of at most {vcpus} vCPUs and {memory} GB, such as n1-highmem-8"
