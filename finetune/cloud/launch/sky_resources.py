"""A task's resources as SkyPilot objects: what they require, and the list of machines by which the policy replaces them.

Only this module and `policy` import SkyPilot at module level.
"""

from __future__ import annotations

from typing import Any

import sky
from sky import global_user_state
from sky.utils.status_lib import ClusterStatus

from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.launch import candidates
from finetune.cloud.launch.candidates import CandidateGroup, Requirement
from finetune.cloud.launch.task_file import DEFAULT_CEILING_USD
from finetune.errors import UserError
from finetune.machine.gpus import GPUS

AUTOSTOP = {"idle_minutes": 10, "down": True}
MOST_IDLE_MINUTES = 60
"""Longest idle time before a machine is terminated: an A100 machine costs about 4 US dollars in it."""
MOST_RESTARTS = 10
NEVER_RECOVERED = {0: "done", 2: "the user's mistake, the same on every machine"}
"""Exit codes after which a new machine ends like the one before it, and what they mean."""
NOT_THERE = ("cloud.unknown_gpu", "cloud.gpu_not_offered", "price.unknown", "launch.no_machine")
"""Codes of the errors of a GPU or machine that is not in the catalog."""
BUDGET = "MAX_RUN_USD"
"""Environment variable of our task YAMLs: the budget of a run in US dollars."""
Json = dict[str, Any]


def asks_for_gpu_on_gcp(task: sky.Task) -> bool:
    """True if every alternative is a GPU that Google Cloud may provide. Raises UserError for a mixture."""
    ours = [bool(_gpus(r)) and (r.cloud is None or r.cloud.is_same_cloud(sky.GCP())) for r in task.resources]
    if any(ours) and not all(ours):
        raise UserError(
            "resources: some alternatives are GPUs on Google Cloud and some are not, and a ceiling can be enforced only "
            "for the former; split them into two tasks",
            code="launch.mixed_alternatives",
        )
    return all(ours) and bool(ours)


def _gpus(resources: sky.Resources) -> Json:
    """GPU -> count, with the built-in GPUs of a machine type, which SkyPilot lists only if the cloud is named too."""
    if resources.accelerators or resources.cloud is not None or resources.instance_type is None:
        return resources.accelerators or {}
    return sky.GCP().get_accelerators_from_instance_type(resources.instance_type) or {}


def refuse_ceilings(task: sky.Task) -> None:
    """For a task that is not on a GPU of Google Cloud. Raises UserError if it has a ceiling: nothing would enforce it there."""
    if any(resources.max_hourly_cost is not None for resources in task.resources):
        name = "resources.max_hourly_cost"
    elif BUDGET in task.envs:
        name = f"envs.{BUDGET}"
    else:
        return
    where = ", ".join(sorted({str(r.cloud or "any cloud") for r in task.resources}))
    raise UserError(
        f"{name}: a ceiling is enforced only on GPUs of Google Cloud, and this task asks for another machine ({where}); "
        f"write `infra: gcp` and a GPU, or remove max_hourly_cost and {BUDGET}",
        code="launch.no_ceiling_there",
    )


def machines_at_once(task: sky.Task, *, updating: bool = False) -> int:
    """The most machines that a task may run at the same time: nodes, times replicas of a service or workers of a pool.

    updating: the replicas of the earlier version still run. SkyServe starts an on-demand replica for each spot replica that is
    not ready if dynamic_ondemand_fallback is set (FallbackRequestRateAutoscaler in SkyPilot's serve/autoscalers.py).
    """
    service = task.service
    if service is None:
        return int(task.num_nodes)
    most = max(service.min_replicas, service.max_replicas or 0)
    replicas = most + (service.num_overprovision or 0) + (most if service.dynamic_ondemand_fallback else 0)
    return int(task.num_nodes * replicas * (2 if updating else 1))


def check_priceable(task: sky.Task) -> None:
    """Raises UserError for resources that would add costs which are not in the price table, or costs without end."""
    if task.volumes:
        raise UserError(
            "volumes: their price is not known here, so the ceiling could not be enforced; use resources.disk_size, or the "
            "bucket",
            code="price.unknown",
        )
    for resources in task.resources:
        if resources.volumes:
            raise UserError(
                "resources.volumes: the price of extra disks is not known here, so the ceiling could not be enforced; "
                "use disk_size, or the bucket",
                code="price.unknown",
            )
        recovery = resources.job_recovery or {}
        strategy = recovery.get("strategy")
        _check_restarts(recovery)
        if strategy == "FAILOVER":
            raise UserError(
                "resources.job_recovery: after a preemption FAILOVER takes any zone of the region, at any price; "
                "use EAGER_NEXT_REGION",
                code="launch.unbounded_recovery",
            )


def _check_restarts(recovery: Json) -> None:
    """Raises UserError if a job that fails for good would be started over and over; each start is billed for boot and set-up."""
    restarts = recovery.get("max_restarts_on_errors") or 0
    if restarts > MOST_RESTARTS:
        raise UserError(
            f"resources.job_recovery.max_restarts_on_errors: expected at most {MOST_RESTARTS}, found {restarts}: each restart "
            "is billed for boot and set-up, also if it fails before the run's ledger begins",
            code="launch.unbounded_recovery",
        )
    codes = recovery.get("recover_on_exit_codes", [])
    for code in codes if isinstance(codes, list) else [codes]:
        if code in NEVER_RECOVERED:
            raise UserError(
                f"resources.job_recovery.recover_on_exit_codes: {code} means {NEVER_RECOVERED[code]}, so the job would be "
                "started without end; 75 is the code to recover on",
                code="launch.unbounded_recovery",
            )


def pin_to_cluster(request: sky.UserRequest) -> bool:
    """Whether the launch names an existing cluster. SkyPilot then takes its machine, running or stopped, whatever the list holds,
    and does not compare sizes: so the task is changed to require only that machine, whose price is checked."""
    options = request.request_options
    name = options.cluster_name if options else None
    machine = getattr(name and global_user_state.get_handle_from_cluster_name(name), "launched_resources", None)
    if machine is None or not isinstance(machine.cloud, sky.GCP):
        return False
    fits = [resources for resources in request.task.resources if resources.less_demanding_than(machine)]
    if fits and global_user_state.get_status_from_cluster_name(name) != ClusterStatus.INIT:
        place = {"cloud": sky.GCP(), "region": machine.region, "zone": machine.zone, "use_spot": machine.use_spot}
        what = {
            "disk_size": machine.disk_size,
            "disk_tier": machine.disk_tier,
            "instance_type": machine.instance_type,
            "accelerators": machine.accelerators,
            "cpus": None,
            "memory": None,
        }
        request.task.set_resources([resources.copy(**place, **what) for resources in fits])
    return True


def machine_requirements(task: sky.Task, catalog: Catalog, machines: int, say: Any) -> list[Requirement]:
    """machines: as many as may run at the same time. An alternative with a GPU that we know but this catalog does not is left
    out, as long as there are others; say prints that."""
    requirements: list[Requirement] = []
    lacking: dict[str, UserError] = {}
    for place, resources in enumerate(task.resources):
        candidates.check_ceiling(resources.max_hourly_cost, "resources.max_hourly_cost")
        gpu, count = _gpu(resources)
        try:
            name, machine = catalog.gpu_name(gpu), resources.instance_type or _machine_of(resources, catalog)
        except UserError as error:
            if gpu not in GPUS or error.code not in NOT_THERE:
                raise
            lacking[f"{gpu}:{count}"] = error
            continue
        requirements.append(
            Requirement(
                gpu=name,
                count=count,
                machine=machine,
                spot=bool(resources.use_spot),
                region=resources.region,
                zone=resources.zone,
                disk_gib=resources.disk_size,
                disk_tier=resources.disk_tier.value if resources.disk_tier else "medium",
                ceiling=DEFAULT_CEILING_USD if resources.max_hourly_cost is None else resources.max_hourly_cost,
                nodes=task.num_nodes,
                machines=machines,
                place=place,
            )
        )
    for gpus, reason in lacking.items():
        if not requirements:
            raise reason
        say(f"finetune: without {gpus}, which has no price in {catalog.source}")
    return requirements


def _gpu(resources: sky.Resources) -> tuple[str, int]:
    ((gpu, count),) = _gpus(resources).items()
    if count != int(count):
        raise UserError(
            f"resources.accelerators: {gpu}:{count} is not a whole number of GPUs", code="cloud.bad_gpu_count"
        )
    return gpu, int(count)


def _machine_of(resources: sky.Resources, catalog: Catalog) -> str:
    """The machine type that SkyPilot would choose if the task names none."""
    gpu, count = _gpu(resources)
    machines = catalog.machines_for(gpu, count)
    feasible = sky.GCP().get_feasible_launchable_resources(resources.copy(cloud=sky.GCP()), 1)
    if not feasible.resources_list:
        priced = ", ".join(f"{gpu}:{number}" for number in catalog.counts_of(gpu)) or "none"
        raise UserError(
            f"resources: SkyPilot finds no machine on Google Cloud for {gpu}:{count} with the other requirements; "
            + (
                f"set instance_type to one of: {', '.join(machines)}"
                if machines
                else f"the catalog has prices for {priced}"
            ),
            code="launch.no_machine",
        )
    return str(feasible.resources_list[0].instance_type)


def pinned(
    task: sky.Task, groups: list[CandidateGroup], catalog: Catalog, managed: bool, by_size: bool
) -> list[sky.Resources]:
    """The ordered list: the alternatives of the task, each pinned to a machine type and a place.

    A machine type is expressed by its vCPUs and memory if SkyPilot finds exactly that type for them: with 24 candidates and a
    catalog of 21,000 rows the optimizer then takes 0.7 s instead of 4.5 s (measured, 2 cores), at every fail-over.
    """
    asked = list(task.resources)
    expressed: dict[tuple[str, str, int, bool], Json] = {}
    pinned = []
    for group in groups:
        offer, alternative = group.best.offer, asked[group.best.requirement.place]
        kind = (offer.machine, offer.gpu, offer.count, offer.spot)
        place = {"cloud": sky.GCP(), "region": offer.region, "zone": group.zone, "use_spot": offer.spot}
        one = alternative.copy(
            **place, accelerators={offer.gpu: offer.count}, instance_type=None, cpus=None, memory=None
        )
        if not managed:
            one = one.copy(autostop=bounded_autostop(alternative))
        if kind not in expressed:
            expressed[kind] = _expression(one, offer.machine, catalog) if by_size else {"instance_type": offer.machine}
        pinned.append(one.copy(**expressed[kind]))
    return pinned


def _expression(resources: sky.Resources, machine: str, catalog: Catalog) -> Json:
    """The resource keys for which SkyPilot finds exactly this machine type."""
    size = catalog.size_of(machine)
    if size:
        by_size = {"cpus": f"{size[0]:g}", "memory": f"{size[1]:g}"}
        found = sky.GCP().get_feasible_launchable_resources(resources.copy(**by_size), 1).resources_list
        if [one.instance_type for one in found] == [machine]:
            return by_size
    return {"instance_type": machine}


def bounded_autostop(resources: sky.Resources) -> Json:
    """The task's autostop, with an idle time of at most MOST_IDLE_MINUTES and `down`: a stopped machine's disk is billed for as
    long as it exists. AUTOSTOP if the task has none."""
    asked = resources.autostop_config
    if not asked or not asked.enabled or asked.idle_minutes < 0:
        return AUTOSTOP
    waits = {"wait_for": asked.wait_for.value} if asked.wait_for else {}
    return {"idle_minutes": min(asked.idle_minutes, MOST_IDLE_MINUTES), "down": True, **waits}


def autostop_changes(resources: sky.Resources) -> str:
    """What `bounded_autostop` changes, as text for the user; "" for nothing."""
    asked, given = resources.autostop_config, bounded_autostop(resources)
    if not asked or not asked.enabled or asked.idle_minutes < 0:
        return f"no autostop in resources: the machine is terminated after {given['idle_minutes']} idle minutes"
    changes = []
    if asked.idle_minutes > MOST_IDLE_MINUTES:
        changes.append(
            f"idle_minutes is {MOST_IDLE_MINUTES}, the most that is allowed, instead of {asked.idle_minutes}"
        )
    if not asked.down:
        changes.append("down is true: a stopped machine's disk would be billed until somebody deletes it")
    return f"autostop: {'; '.join(changes)}" if changes else ""
