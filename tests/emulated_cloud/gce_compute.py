"""The compute API: instances and their operations, disks, and what SkyPilot asks about networks, images and quotas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.emulated_cloud.gce_filter import matches
from tests.emulated_cloud.gce_http import ApiError, Call, Handler, Json, not_found, route
from tests.emulated_cloud.gce_instances import STOPPING, TERMINATED, Instance, Instances, parse_request
from tests.emulated_cloud.gce_market import GPUS_ALL_REGIONS, PLENTY, Market
from tests.emulated_cloud.gce_operations import Operations

ROOT = "/compute/v1/projects/{project}"
ZONE, INSTANCE = f"{ROOT}/zones/{{zone}}", f"{ROOT}/zones/{{zone}}/instances/{{name}}"
FIREWALL = {
    "name": "default-allow-everything",
    "direction": "INGRESS",
    "priority": 1000,
    "allowed": [{"IPProtocol": "all"}],
}
GPU_METRICS = [
    f"{kind}NVIDIA_{gpu}_GPUS"
    for kind in ("", "PREEMPTIBLE_")
    for gpu in ("A100", "A100_80GB", "L4", "T4", "V100", "H100")
]


class Compute:
    """boot_seconds: added to the time that a machine really takes to start. zones: those that exist."""

    def __init__(self, project: str, instances: Instances, market: Market, zones: list[str]) -> None:
        self.project, self.instances, self.market, self.zones = project, instances, market, zones
        self.operations = Operations()
        self.firewalls: dict[str, Json] = {}
        self.boot_seconds = 0.0
        self.base = "https://www.googleapis.com/compute/v1"

    def routes(self) -> list[tuple[tuple[str, Any], Handler]]:
        regions = f"{ROOT}/regions/{{region}}"
        return [
            (route("GET", ROOT), self.get_project),
            (route("POST", f"{ZONE}/instances/bulkInsert"), self.bulk_insert),
            (route("POST", f"{ZONE}/instances"), self.insert),
            (route("GET", f"{ZONE}/instances"), self.list_instances),
            (route("GET", INSTANCE), lambda call, project, zone, name: self.instances.get(zone, name).json(self.base)),
            (route("DELETE", INSTANCE), self.delete),
            (route("POST", f"{INSTANCE}/stop"), self.stop),
            (route("POST", f"{INSTANCE}/start"), self.start),
            (route("POST", f"{INSTANCE}/{{what}}"), self.set_part),
            (route("GET", f"{ZONE}/disks"), lambda call, project, zone: {"items": self.disks(zone)}),
            (route("POST", f"{ZONE}/disks/{{name}}/resize"), self.resize_disk),
            (route("GET", f"{ZONE}/reservations"), lambda call, project, zone: {"items": []}),
            *[
                (route(method, f"{place}/operations/{{operation}}{end}"), handler)
                for place in (ZONE, regions, f"{ROOT}/global")
                for method, end, handler in (("GET", "", self.get_operation), ("POST", "/wait", self.wait_operation))
            ],
            (route("GET", f"{ROOT}/zones"), self.list_zones),
            (route("GET", f"{ROOT}/regions"), self.list_regions),
            (route("GET", regions), self.get_region),
            (route("GET", f"{regions}/subnetworks"), self.list_subnetworks),
            (route("GET", f"{ROOT}/global/networks"), self.list_networks),
            (route("GET", f"{ROOT}/global/networks/{{network}}/getEffectiveFirewalls"), self.effective_firewalls),
            (route("GET", f"{ROOT}/global/firewalls"), self.list_firewalls),
            (route("POST", f"{ROOT}/global/firewalls"), self.insert_firewall),
            (route("GET", f"{ROOT}/global/firewalls/{{name}}"), self.get_firewall),
            (route("PUT", f"{ROOT}/global/firewalls/{{name}}"), self.insert_firewall),
            (route("DELETE", f"{ROOT}/global/firewalls/{{name}}"), self.delete_firewall),
            (route("GET", f"{ROOT}/global/images/{{name}}"), self.get_image),
            (
                route("GET", f"{ZONE}/machineTypes/{{name}}"),
                lambda call, project, zone, name: {"name": name, "zone": zone},
            ),
        ]

    # Instances

    def bulk_insert(self, call: Call, project: str, zone: str) -> Json:
        return self._make(zone, list(call.body["perInstanceProperties"]), call.body["instanceProperties"])

    def insert(self, call: Call, project: str, zone: str) -> Json:
        return self._make(zone, [call.body["name"]], call.body)

    def _make(self, zone: str, names: list[str], properties: Json) -> Json:
        if zone not in self.zones:
            raise ApiError(400, "invalid", f"Invalid value for field 'zone': '{zone}'. Unknown zone.")
        request = parse_request(zone, properties)

        def work() -> None:
            with self.instances.lock:
                refusal = self.market.refusal(request, len(names), self.instances.running())
                if refusal:
                    raise ApiError(400, *refusal)
                made = [self.instances.create(name, request, properties) for name in names]
            time.sleep(self.boot_seconds)
            self._together(self.instances.power_on, made)

        return self.operations.begin("bulkInsert", f"{self.base}/projects/{self.project}/zones/{zone}", work, zone)

    def _together(self, act: Callable[[Instance], None], made: list[Instance]) -> None:
        """All or none, like bulkInsert with the default minimum count."""
        try:
            for instance in made:
                act(instance)
        except Exception:
            for instance in made:
                self.instances.delete(instance, "failed")
            raise

    def list_instances(self, call: Call, project: str, zone: str) -> Json:
        try:
            with self.instances.lock:
                rows = [one.json(self.base) for (where, _), one in self.instances.found.items() if where == zone]
            found = [row for row in rows if matches(row, call.query.get("filter", ""))]
        except ValueError as error:
            raise ApiError(400, "invalid", str(error)) from None
        return {"kind": "compute#instanceList", **({"items": found} if found else {})}

    def delete(self, call: Call, project: str, zone: str, name: str) -> Json:
        instance = self.instances.get(zone, name)
        instance.status = STOPPING
        return self.operations.begin("delete", name, lambda: self.instances.delete(instance, "deleted"), zone)

    def stop(self, call: Call, project: str, zone: str, name: str) -> Json:
        instance = self.instances.get(zone, name)
        instance.status = STOPPING

        def work() -> None:
            if instance.hardware:
                instance.hardware.shut_down()
            self.instances.power_off(instance, "stopped")

        return self.operations.begin("stop", name, work, zone)

    def start(self, call: Call, project: str, zone: str, name: str) -> Json:
        instance = self.instances.get(zone, name)

        def work() -> None:
            if instance.status != TERMINATED:
                raise ApiError(400, "RESOURCE_NOT_READY", f"The resource '{name}' is not ready")
            refusal = self.market.refusal(instance.request, 1, self.instances.running())
            if refusal:
                raise ApiError(400, *refusal)
            self.instances.power_on(instance)

        return self.operations.begin("start", name, work, zone)

    def set_part(self, call: Call, project: str, zone: str, name: str, what: str) -> Json:
        instance = self.instances.get(zone, name)
        with instance.lock:
            given = call.body.get("labelFingerprint" if what == "setLabels" else "fingerprint")
            if what == "setLabels" and given != f"f{instance.fingerprints}":
                raise ApiError(
                    412, "conditionNotMet", "Labels fingerprint either invalid or resource labels have changed"
                )
            if what == "setLabels":
                instance.labels = dict(call.body["labels"])
            elif what == "setTags":
                instance.tags = list(call.body.get("items") or [])
            elif what == "setMetadata":
                instance.metadata = list(call.body.get("items") or [])
            else:
                raise ApiError(501, "notImplemented", f"the emulated Google Cloud does not know instances.{what}")
            instance.fingerprints += 1
        return self.operations.begin(what, name, None, zone)

    def get_operation(self, call: Call, operation: str, **_: str) -> Json:
        return self.operations.get(operation)

    def wait_operation(self, call: Call, operation: str, **_: str) -> Json:
        return self.operations.wait(operation)

    # Disks

    def disks(self, zone: str | None = None) -> list[Json]:
        with self.instances.lock:
            return [
                {"name": one.name, "sizeGb": str(one.gb), "type": one.kind, "zone": one.zone}
                for one in self.instances.disks.values()
                if zone in (None, one.zone)
            ]

    def resize_disk(self, call: Call, project: str, zone: str, name: str) -> Json:
        if (zone, name) not in self.instances.disks:
            raise not_found(f"projects/{project}/zones/{zone}/disks/{name}")
        self.instances.disks[zone, name].gb = int(call.body["sizeGb"])
        return self.operations.begin("resize", name, None, zone)

    # The project, its regions and quotas

    def quotas(self, region: str) -> list[Json]:
        running = self.instances.running()
        metrics = [GPUS_ALL_REGIONS] if region == "global" else GPU_METRICS
        used = {
            m: sum(w.gpus for w in running if region == "global" or (w.quota == m and w.region == region))
            for m in metrics
        }
        rows = [{"metric": m, "limit": self.market.limit(m, region), "usage": float(used[m])} for m in metrics]
        return [*rows, {"metric": "CPUS", "limit": PLENTY, "usage": 0.0}]

    def get_project(self, call: Call, project: str) -> Json:
        return {
            "kind": "compute#project",
            "name": project,
            "commonInstanceMetadata": {"items": []},
            "quotas": self.quotas("global"),
        }

    def list_zones(self, call: Call, project: str) -> Json:
        return {"items": [{"name": zone, "region": zone.rpartition("-")[0], "status": "UP"} for zone in self.zones]}

    def list_regions(self, call: Call, project: str) -> Json:
        return {
            "items": [
                {"name": region, "status": "UP"} for region in sorted({zone.rpartition("-")[0] for zone in self.zones})
            ]
        }

    def get_region(self, call: Call, project: str, region: str) -> Json:
        return {"name": region, "status": "UP", "quotas": self.quotas(region)}

    # Networks: a single one without restrictions

    def list_subnetworks(self, call: Call, project: str, region: str) -> Json:
        place = f"{self.base}/projects/{project}"
        link = f"{place}/regions/{region}/subnetworks/default"
        return {
            "items": [
                {"name": "default", "region": region, "network": f"{place}/global/networks/default", "selfLink": link}
            ]
        }

    def list_networks(self, call: Call, project: str) -> Json:
        rows = [{"name": "default", "selfLink": f"{self.base}/projects/{project}/global/networks/default"}]
        found = [row for row in rows if matches(row, call.query.get("filter", ""))]
        return {"items": found} if found else {}

    def effective_firewalls(self, call: Call, project: str, network: str) -> Json:
        rules = [FIREWALL | {"sourceRanges": [source]} for source in ("0.0.0.0/0", "10.128.0.0/9")]
        return {"firewalls": [*rules, *self.firewalls.values()]}

    def list_firewalls(self, call: Call, project: str) -> Json:
        found = [row for row in self.firewalls.values() if matches(row, call.query.get("filter", ""))]
        return {"items": found} if found else {}

    def insert_firewall(self, call: Call, project: str, name: str = "") -> Json:
        self.firewalls[name or call.body["name"]] = call.body
        return self.operations.begin("insert", name or call.body["name"], None)

    def get_firewall(self, call: Call, project: str, name: str) -> Json:
        if name not in self.firewalls:
            raise not_found(f"projects/{project}/global/firewalls/{name}")
        return self.firewalls[name]

    def delete_firewall(self, call: Call, project: str, name: str) -> Json:
        self.firewalls.pop(name, None)
        return self.operations.begin("delete", name, None)

    def get_image(self, call: Call, project: str, name: str) -> Json:
        return {"name": name, "diskSizeGb": "50", "status": "READY"}
