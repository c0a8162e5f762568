"""GPU quotas of a Google Cloud project: their names, how gcloud prints them, how to request more.

A GPU needs the quota of its model in the region (for spot machines the `PREEMPTIBLE_` one instead) and GPUS_ALL_REGIONS, which
covers all models and regions. A spot machine counts against the ordinary quota only in a region that has no preemptible quota
(Google's page on Spot VMs), where gcloud lists none or 0. SkyPilot is stricter: before a launch it skips a region whose
preemptible quota is 0, and tries one where it is not listed (0.14.1, check_quota_available).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from finetune.runtime.files import parse_json

TASK_GPUS = ("T4", "V100", "L4", "A100", "A100-80GB", "H100")
"""The GPUs of the task YAMLs whose quotas have a name that we know; that of the RTX PRO 6000 is not known here."""
SPOT_ONLY = ("H100",)
"""Of these, the GPUs that our tasks use on spot machines only."""
ALL_REGIONS = "GPUS_ALL_REGIONS"
QUOTA_PAGE = "console.cloud.google.com/iam-admin/quotas"


@dataclass(frozen=True)
class Quota:
    """GPUs that may run at once (limit, infinite if there is none) and GPUs in use (usage)."""

    limit: float
    usage: float


Quotas = dict[str, Quota]
"""Metric, such as NVIDIA_T4_GPUS -> quota."""


def metric(gpu: str, spot: bool) -> str:
    """The quota's name for SkyPilot's name of a GPU: A100-80GB -> NVIDIA_A100_80GB_GPUS."""
    return f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{gpu.upper().replace('-', '_')}_GPUS"


def usable(quotas: Quotas, gpu: str, spot: bool) -> Quota:
    """The quota of a GPU that SkyPilot can use in a region with these quotas; limit 0 if nothing is listed."""
    nothing = Quota(0, 0)
    return quotas.get(metric(gpu, spot)) or quotas.get(metric(gpu, spot=False), nothing)


def passed_over(quotas: Quotas, gpu: str) -> bool:
    """Whether SkyPilot skips a region where Google would let a spot machine use the ordinary quota."""
    return usable(quotas, gpu, spot=True).limit == 0 and usable(quotas, gpu, spot=False).limit > 0


def read_regions(text: str) -> dict[str, Quotas]:
    """Region -> quotas, from `gcloud compute regions list --format=json(name,quotas)`.

    A region for which Google returned no quotas is left out. Raises ValueError on any other output.
    """
    regions = parse_json(text)
    if not isinstance(regions, list):
        raise ValueError("no list of regions")
    return {_name(region): _quotas(region["quotas"]) for region in regions if _name(region) and region.get("quotas")}


def read_project(text: str) -> Quotas:
    """The quotas over all regions, from `gcloud compute project-info describe --format=json(quotas)`.

    Raises ValueError on any other output.
    """
    project = parse_json(text)
    if not isinstance(project, dict):
        raise ValueError("no project")
    return _quotas(project.get("quotas") or [])


def _name(region: Any) -> str:
    if not isinstance(region, dict) or not isinstance(region.get("name"), str):
        raise ValueError("a region without a name")
    return str(region["name"])


def _quotas(rows: Any) -> Quotas:
    try:
        return {str(row["metric"]): Quota(_limit(row["limit"]), float(row.get("usage", 0))) for row in rows}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a quota that is not one: {error}") from error


def _limit(value: Any) -> float:
    limit = float(value)
    return math.inf if limit < 0 else limit  # Google writes -1 for no limit


def how_to_request(name: str, region: str = "", wanted: float = 1) -> str:
    """The remedy of a message: where to request a quota; without a region, the one over all regions. wanted: GPUs."""
    return f"request {name} = {wanted:g}{f' in {region}' if region else ''} on {QUOTA_PAGE} (filter on that name)"


def request_command(name: str, project: str, region: str = "", wanted: float = 1) -> str:
    """The gcloud command that requests a quota of so many GPUs (Cloud Quotas; `gcloud beta quotas preferences create`)."""
    scope = "per-project-region" if region else "per-project"
    return (
        f"gcloud beta quotas preferences create --project={project} --service=compute.googleapis.com"
        f" --quota-id={name.replace('_', '-')}-{scope} --preferred-value={wanted:g}"
        f"{f' --dimensions=region={region}' if region else ''} --email=<your address>"
    )
