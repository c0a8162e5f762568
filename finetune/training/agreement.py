"""Whether all processes of a run compute the same: on several machines, data and packages may differ."""

from __future__ import annotations

import sys
from typing import Any

from finetune.errors import UserError
from finetune.run_folder import git_state, package_versions
from finetune.runtime import distributed
from finetune.training.setup import Inputs


def check_agreement(inputs: Inputs) -> None:
    """Compare what the processes have with what rank 0 has. Raises UserError there for the first difference."""
    if distributed.world_size() == 1:
        return
    found = distributed.gather_on_rank0(
        {
            "data": inputs.data.manifest_hash,
            "dtype": inputs.device.dtype_name,
            "versions": {"Python": sys.version.split()[0], "finetune (commit)": git_state()[0], **package_versions()},
        }
    )
    for rank, other in enumerate(found or []):
        _compare(rank, other, found[0], inputs)  # type: ignore[index]


def _compare(rank: int, other: dict[str, Any], first: dict[str, Any], inputs: Inputs) -> None:
    if other["data"] != first["data"]:
        raise UserError(
            f"{inputs.data.folder}: process {rank} has other prepared data (manifest {other['data'][:12]}) than process 0 "
            f"({first['data'][:12]}); copy that folder from one machine to all others",
            code="distributed.other_data",
        )
    if other["dtype"] != first["dtype"]:
        raise UserError(
            f"process {rank} computes in {other['dtype']}, process 0 in {first['dtype']}; use the same kind of GPU on all "
            "machines, or set model.torch_dtype",
            code="distributed.other_dtype",
        )
    names = first["versions"].keys() | other["versions"].keys()
    different = [
        f"{name} {other['versions'].get(name)} instead of {first['versions'].get(name)}"
        for name in sorted(names)
        if other["versions"].get(name) != first["versions"].get(name)
    ]
    if different:
        raise UserError(
            f"process {rank} has {', '.join(different)}; install the same versions on all machines",
            code="distributed.other_versions",
        )
