"""The real SkyPilot in one process, with the cloud's answers replaced: reads requests from stdin, a JSON object a line, and
answers each with a line. Started by `sky_home.SkyWorker`, which documents the requests; HOME has to be a fake one.

Only the two calls that leave the machine are replaced: `provisioner.bulk_provision`, which would create a machine and here
records it and answers with a stock-out, and the Google API client that reads the project's SSH keys. The recorded values come
from the cluster file that SkyPilot wrote for that call, not from the task.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import sky
from sky import admin_policy, check, exceptions, execution, global_user_state, optimizer, skypilot_config
from sky.adaptors import gcp
from sky.catalog import gcp_catalog
from sky.clouds.cloud import CloudCapability
from sky.provision import common as provision_common
from sky.provision import provisioner
from sky.server.requests import request_names
from sky.skylet import constants
from sky.utils import admin_policy_utils, common, dag_utils
from sky.utils import annotations as sky_annotations

from finetune.errors import UserError

Json = dict[str, Any]


class Launched(BaseException):
    """A machine was provisioned. Not an Exception, because SkyPilot fails over on every Exception."""


class Market:
    """The stock of the cloud: records every machine that is requested, and provisions it unless it is out of stock.

    Args:
        stocked_out: "all", or [zone, gpu, spot] triples in which null matches any value.
        limit: provisions the machine after that many attempts, whatever is in stock.
        code: Google's error code of the refusal; message: its text.
    """

    def __init__(self, stocked_out: Any, limit: int | None, code: str, message: str) -> None:
        self.stocked_out, self.limit, self.code, self.message = stocked_out, limit, code, message
        self.tried: list[Json] = []

    def refuses(self, machine: Json) -> bool:
        if self.limit is not None and len(self.tried) >= self.limit:
            return False
        if self.stocked_out == "all":
            return True
        asked = (machine["zone"], machine["gpu"], machine["spot"])
        return any(all(w in (None, a) for w, a in zip(want, asked, strict=True)) for want in self.stocked_out)

    def bulk_provision(self, *_: Any, cluster_yaml: str, **__: Any) -> None:
        """Replaces SkyPilot's function of that name, which creates the machine."""
        machine = machine_in(global_user_state.get_cluster_yaml_dict(cluster_yaml))
        self.tried.append(machine)
        if not self.refuses(machine):
            raise Launched
        error = provision_common.ProvisionerError("no machine")
        error.errors = [{"code": self.code, "message": self.message}]
        raise error


class NoCompute:
    """Stand-in for the compute API: the project has an SSH key, and every other call fails the test."""

    def projects(self) -> NoCompute:
        return self

    def get(self, project: str) -> NoCompute:
        return self

    def execute(self) -> Json:
        return {"commonInstanceMetadata": {"items": [{"key": "ssh-keys", "value": ""}]}}


def machine_in(cluster: Json) -> Json:
    """The machine that a cluster file of SkyPilot requests from Google, in the terms of SkyPilot's catalog."""
    node = cluster["available_node_types"][cluster["head_node_type"]]["node_config"]
    gpus = node.get("guestAccelerators") or [{"acceleratorType": "", "acceleratorCount": 0}]
    disk = node["disks"][0]["initializeParams"]
    return {
        "machine": node["machineType"],
        "gpu": gpus[0]["acceleratorType"].rpartition("/")[2].removeprefix("nvidia-").removeprefix("tesla-").upper(),
        "count": gpus[0]["acceleratorCount"],
        "region": cluster["provider"]["region"],
        "zone": cluster["provider"]["availability_zone"],
        "spot": node["scheduling"].get("provisioningModel") == "SPOT",
        "disk_gb": disk["diskSizeGb"],
        "disk_type": disk["diskType"].rpartition("/")[2],
    }


def machine_of(resources: Any) -> Json:
    """The same for the optimizer's result; `usd_per_hour` is SkyPilot's own, without disk."""
    gpu, gpus = next(iter((resources.accelerators or {"": 0}).items()))
    return {
        "machine": resources.instance_type,
        "gpu": gpu,
        "count": gpus,
        "region": resources.region,
        "zone": resources.zone,
        "spot": resources.use_spot,
        "usd_per_hour": float(resources.get_cost(3600)),
    }


def code_of(error: BaseException | None) -> str | None:
    """The code of the UserError that our policy converted into SkyPilot's error."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error.code if error else None


@contextmanager
def client_config(policy: str | None) -> Iterator[None]:
    config = skypilot_config.to_dict()
    config.set_nested(("admin_policy",), policy)
    with skypilot_config.replace_skypilot_config(config):
        yield


def as_sent(dag: Any, ask: Json, name: str) -> Any:
    """The task as the client of `sky launch` sends it: after the policy, if one is named, and a round trip through YAML."""
    if ask.get("policy"):
        request = request_names.AdminPolicyRequestName[ask.get("request", "CLUSTER_LAUNCH")]
        autostop = [r.autostop_config for t in dag.tasks for r in t.resources if r.autostop_config is not None]
        options: admin_policy.RequestOptions | None = admin_policy.RequestOptions(
            cluster_name=name,
            idle_minutes_to_autostop=autostop[0].idle_minutes if autostop else None,
            down=autostop[0].down if autostop else False,
            dryrun=ask["op"] == "optimize",
        )
        if request.name.startswith("JOBS"):  # SkyPilot passes none for managed jobs
            options = None
        with client_config(ask["policy"]):
            dag, _ = admin_policy_utils.apply(dag, request, options, at_client_side=True)
    return dag_utils.load_dag_from_yaml_str(dag_utils.dump_dag_to_yaml_str(dag))


def reachable(task: Any) -> list[Json]:
    """Every machine that the optimizer can choose, so every possible result of a fail-over, unordered."""
    launchables, *_ = optimizer._fill_in_launchable_resources(task, None, quiet=True)
    machines = {json.dumps(machine_of(one), sort_keys=True) for found in launchables.values() for one in found}
    return [json.loads(text) for text in sorted(machines)]


def launch(dag: Any, ask: Json, name: str) -> Json:
    market = Market(
        ask.get("stocked_out", "all"),
        ask.get("limit"),
        ask.get("code", "ZONE_RESOURCE_POOL_EXHAUSTED"),
        ask.get("message", "The zone does not have enough resources available to fulfill the request."),
    )
    provisioner.bulk_provision = market.bulk_provision  # type: ignore[assignment]
    result: Json = {"tried": market.tried, "launched": None}
    try:
        execution.launch(dag, cluster_name=name)
    except Launched:
        result["launched"] = market.tried[-1]
    except exceptions.ResourcesUnavailableError as error:
        if not market.tried:
            raise
        result["message"] = plain(str(error))
    return result


def answer(ask: Json, name: str) -> Json:
    dag = sky.Dag()
    dag.add(sky.Task.from_yaml(ask["yaml"]) if "yaml" in ask else sky.Task.from_yaml_config(ask["task"]))
    dag = as_sent(dag, ask, name)
    task = dag.tasks[0]
    result: Json = {"sent": task.to_yaml_config()}
    if ask["op"] == "reachable":
        result["reachable"] = reachable(task)
    elif ask["op"] == "optimize":
        optimizer.Optimizer.optimize(dag, common.OptimizeTarget.COST)
        result["chosen"] = machine_of(task.best_resources)
    elif ask["op"] == "launch":
        result |= launch(dag, ask, name)
    else:
        raise ValueError(f"op {ask['op']!r}: expected optimize, reachable or launch")
    return result


LOOKUPS = (
    *("get_instance_type_for_accelerator", "get_region_zones_for_accelerators", "get_region_zones_for_instance_type"),
    *("check_accelerator_attachable_to_host", "validate_region_zone", "get_vcpus_mem_from_instance_type"),
    *("get_hourly_cost", "get_accelerator_hourly_cost"),
)


def remember_lookups() -> None:
    """Cache the look-ups of SkyPilot's catalog: each step of a fail-over repeats all look-ups of the previous one, and they take
    most of its time. The catalog does not change while this process runs."""

    def remembering(lookup: Callable[..., Any]) -> Callable[..., Any]:
        known: Json = {}

        def look_up(*args: Any, **kwargs: Any) -> Any:
            question = repr((args, kwargs))
            if question not in known:
                known[question] = lookup(*args, **kwargs)
            return copy.deepcopy(known[question])

        return look_up

    for name in LOOKUPS:
        setattr(gcp_catalog, name, remembering(getattr(gcp_catalog, name)))


def plain(text: str) -> str:
    """The text without colour codes and the codes of SkyPilot's spinner."""
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()
    return "\n".join(line for line in lines if not line.startswith("<sky-payload>"))


@contextmanager
def everything_printed() -> Iterator[list[str]]:
    """Collects what this process and its children write to standard output and error, at the level of file descriptors."""
    texts: list[str] = []
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in enumerate(kept, start=1):
                os.dup2(source, target)
                os.close(source)
            file.seek(0)
            texts.append(plain(file.read().decode(errors="replace")))


def enable_gcp() -> None:
    """Record in SkyPilot's state that GCP passed `sky check`, which would ask Google."""
    for capability in (CloudCapability.COMPUTE, CloudCapability.STORAGE):
        global_user_state.set_enabled_clouds(["gcp"], capability, "default")
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    enable_gcp()
    if os.environ.get("FT_CATALOG_URL"):  # where SkyPilot fetches its price catalog
        constants.HOSTED_CATALOG_DIR_URL = os.environ["FT_CATALOG_URL"]
    gcp.build = lambda *_, **__: NoCompute()
    remember_lookups()
    for number, line in zip(count(), sys.stdin, strict=False):
        sky_annotations.clear_request_level_cache()
        with everything_printed() as printed:
            try:
                result = answer(json.loads(line), f"test-{os.getpid()}-{number}")
            except (Exception, SystemExit) as error:
                result = {"error": type(error).__name__, "message": plain(str(error)), "code": code_of(error)}
        print(json.dumps(result | {"printed": printed[0]}, default=str), file=replies, flush=True)


if __name__ == "__main__":
    enable_gcp() if sys.argv[1:] == ["--enable-gcp"] else main()
