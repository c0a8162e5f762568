"""Started by tests/cloud/launch/test_sky_tasks.py with its own HOME: loads task YAMLs with the real SkyPilot and
prints the result.

python sky_tasks_worker.py FILE...        (in the root of the checkout; JSON on stdout, keyed by file)
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import sky
from sky import skypilot_config
from sky.data.storage_utils import get_excluded_files
from sky.jobs.recovery_strategy import StrategyExecutor


def describe(path: str) -> dict[str, Any]:
    task = sky.Task.from_yaml(path)
    task.validate_name()
    return {
        "name": task.name,
        "workdir": task.workdir,
        "ordered": isinstance(task.resources, list),
        "machines": [describe_machine(resources) for resources in task.resources],
        "envs": task.envs,
        "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
        "waits_for_secrets": len(task.managed_secret_refs),
        "copied": task.file_mounts,
        "mounts": {place: describe_storage(storage) for place, storage in task.storage_mounts.items()},
        "setup": task.setup,
        "run": task.run,
    }


def describe_machine(resources: sky.Resources) -> dict[str, Any]:
    autostop = resources.autostop_config
    return {
        "cloud": str(resources.cloud),
        "gpu": resources.accelerators,
        "machine": resources.instance_type,
        "spot": resources.use_spot,
        "disk_gb": resources.disk_size,
        "disk_tier": resources.disk_tier and resources.disk_tier.value,
        "ceiling": resources.max_hourly_cost,
        "autostop": autostop and [autostop.enabled, autostop.idle_minutes, autostop.down],
        "ports": resources.ports,
        "place": [resources.region, resources.zone],
        "recovery": resources.job_recovery,
    }


def describe_storage(storage: sky.Storage) -> dict[str, Any]:
    return {
        "name": storage.name,
        "source": storage.source,
        "persistent": storage.persistent,
        "mode": storage.mode.value,
        "stores": [store.value for store in storage.stores],
    }


def restarts(path: str, codes: list[int]) -> dict[int, list[bool]]:
    """Whether SkyPilot's own recovery restarts the job after each exit code: at the first time, and at the third."""
    found = {}
    for code in codes:
        task = sky.Task.from_yaml(path)
        executor = StrategyExecutor.make(
            "cluster", sky.backends.CloudVmRayBackend(), task, 1, 0, None, set(), asyncio.Lock(), asyncio.Condition()
        )
        answers = [executor.should_restart_on_failure([code]) for _ in range(3)]
        found[code] = [answers[0], answers[2]]
    return found


def main() -> None:
    files = sys.argv[1:]
    found: dict[str, Any] = {path: describe(path) for path in files}
    managed = [path for path in files if found[path]["machines"][0]["recovery"]]
    found["restarts"] = {path: restarts(path, [1, 2, 75, 137]) for path in managed}
    named = sky.Task.from_yaml_config(
        {"file_mounts": {"/bucket": {"name": "${BUCKET}", "store": "gcs"}}, "envs": {"BUCKET": "auto"}},
        env_overrides=[("BUCKET", "mine")],
    )
    found["bucket given by --env"] = named.storage_mounts["/bucket"].name
    found["policy"] = skypilot_config.get_nested(("admin_policy",), None)
    found["left behind"] = sorted(get_excluded_files("."))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
