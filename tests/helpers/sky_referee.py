"""SkyPilot's own prices, machines and disks. A separate program, because `sky` reads HOME when it is imported.

Reads one JSON object on standard input and answers with one on standard output:
prices: [gpu, count, machine, zone, spot] -> dollars per hour; attach: [gpu, count, machine] -> whether that is possible;
zones: [gpu, count, machine, spot] -> the zones that SkyPilot would try; disks: [machine, tier] -> disk type.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sky import clouds, exceptions
from sky.catalog import common, gcp_catalog
from sky.skylet import constants
from sky.utils.resources_utils import DiskTier


def price(gpu: str, count: int, machine: str, zone: str, spot: bool) -> float:
    google = clouds.GCP()
    host = google.instance_type_to_hourly_cost(machine, use_spot=spot, zone=zone)
    return float(host + google.accelerators_to_hourly_cost({gpu: count}, use_spot=spot, zone=zone))


def attaches(gpu: str, count: int, machine: str) -> bool:
    try:
        gcp_catalog.check_accelerator_attachable_to_host(machine, {gpu: count})
    except (exceptions.ResourcesMismatchError, KeyError):
        return False
    return True


def zones(gpu: str, count: int, machine: str, spot: bool) -> list[str]:
    regions = clouds.GCP.regions_with_offering(machine, {gpu: count}, use_spot=spot, region=None, zone=None)
    return sorted(zone.name for region in regions for zone in region.zones or ())


def disk(machine: str, tier: str) -> str:
    tiers = None if tier == "none" else DiskTier(tier)
    return str(clouds.GCP._get_disk_type(machine, clouds.GCP.failover_disk_tier(machine, tiers)))


def answers(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "prices": [price(*one) for one in asked["prices"]],
        "attach": [attaches(*one) for one in asked["attach"]],
        "zones": [zones(*one) for one in asked["zones"]],
        "disks": [disk(*one) for one in asked["disks"]],
        "schema": constants.CATALOG_SCHEMA_VERSION,
        "path": common.get_catalog_path("gcp/vms.csv"),
        "hours": gcp_catalog._PULL_FREQUENCY_HOURS,
        "own_machines": gcp_catalog._ACC_INSTANCE_TYPE_DICTS,
        "n1_limits": gcp_catalog._NUM_ACC_TO_MAX_CPU_AND_MEMORY,
    }


if __name__ == "__main__":
    print(json.dumps(answers(json.load(sys.stdin))))
