"""The instances of the emulated Google Cloud and their life cycle."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from tests.emulated_cloud.gce_bill import Bill, Stretch
from tests.emulated_cloud.gce_http import ApiError, Json, not_found
from tests.emulated_cloud.gce_market import ACCELERATORS, BUILT_IN, MachineRequest

RUNNING, STOPPING, TERMINATED = "RUNNING", "STOPPING", "TERMINATED"


class Hardware(Protocol):
    """What an instance runs on: `machine.Machine`; nothing in tests of the API by itself."""

    def boot(self) -> None: ...
    def power_off(self) -> None: ...
    def notice(self) -> None: ...
    def shut_down(self) -> None: ...
    def cut(self, what: str) -> None: ...
    def reconnect(self) -> None: ...
    def discard(self) -> None: ...


@dataclass
class Disk:
    """Created with its machine. auto_delete: whether it is deleted with it; otherwise it costs until it is deleted."""

    name: str
    zone: str
    gb: int
    kind: str
    auto_delete: bool


@dataclass
class Instance:
    """address: both internal and external. disks: the first is the boot disk."""

    name: str
    id: int
    request: MachineRequest
    project: str
    address: str
    spot_action: str
    labels: dict[str, str]
    metadata: list[Json]
    tags: list[str]
    disks: list[Disk]
    scheduling: Json
    status: str = "PROVISIONING"
    hardware: Hardware | None = None
    created: str = ""
    started: str = ""
    fingerprints: int = 1
    stretch: Stretch | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def disk_gb(self) -> int:
        return sum(disk.gb for disk in self.disks)

    def json(self, base: str) -> Json:
        """The answer of compute.instances.get."""
        zone = f"{base}/projects/{self.project}/zones/{self.request.zone}"
        network = f"{base}/projects/{self.project}/global/networks/default"
        access = (
            [{"type": "ONE_TO_ONE_NAT", "name": "External NAT", "natIP": self.address}]
            if self.status == RUNNING
            else [{}]
        )
        gpus = [
            {"acceleratorType": f"{zone}/acceleratorTypes/{g}", "acceleratorCount": self.request.gpus}
            for g in self._google_gpu()
        ]
        return {
            "kind": "compute#instance",
            "id": str(self.id),
            "name": self.name,
            "zone": zone,
            "status": self.status,
            "machineType": f"{zone}/machineTypes/{self.request.machine_type}",
            "guestAccelerators": gpus,
            "labels": dict(self.labels),
            "labelFingerprint": f"f{self.fingerprints}",
            "tags": {"items": list(self.tags), "fingerprint": f"f{self.fingerprints}"},
            "metadata": {"items": list(self.metadata), "fingerprint": f"f{self.fingerprints}"},
            "scheduling": self.scheduling,
            "networkInterfaces": [
                {"name": "nic0", "network": network, "networkIP": self.address, "accessConfigs": access}
            ],
            "disks": [
                {
                    "boot": disk is self.disks[0],
                    "autoDelete": disk.auto_delete,
                    "source": f"{zone}/disks/{disk.name}",
                    "diskSizeGb": str(disk.gb),
                }
                for disk in self.disks
            ],
            "creationTimestamp": self.created,
            "lastStartTimestamp": self.started or self.created,
            "selfLink": f"{zone}/instances/{self.name}",
        }

    def _google_gpu(self) -> list[str]:
        return [google for google, gpu in ACCELERATORS.items() if gpu == self.request.gpu][:1]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "+00:00"


def parse_request(zone: str, properties: Json) -> MachineRequest:
    """The machine that the body of an insert asks for. Raises ApiError for an unknown GPU."""
    machine_type = properties["machineType"].rsplit("/", 1)[-1]
    gpu, gpus = BUILT_IN.get(machine_type, ("", 0))
    for accelerator in properties.get("guestAccelerators", []):
        google = accelerator["acceleratorType"].rsplit("/", 1)[-1]
        if google not in ACCELERATORS:
            raise ApiError(400, "invalid", f"Invalid value for field 'acceleratorType': '{google}'.")
        gpu, gpus = ACCELERATORS[google], int(accelerator["acceleratorCount"])
    scheduling = properties.get("scheduling") or {}
    spot = bool(scheduling.get("preemptible")) or scheduling.get("provisioningModel") == "SPOT"
    return MachineRequest(zone, machine_type, gpu, gpus, spot)


def parse_disks(name: str, zone: str, properties: Json) -> list[Disk]:
    """A machine's disks, from the body of an insert: as at Google they outlive the machine unless the body says otherwise."""
    disks = []
    for number, asked in enumerate(properties.get("disks") or [{"autoDelete": True}]):
        about = asked.get("initializeParams", {})
        kind = str(about.get("diskType", "pd-standard")).rsplit("/", 1)[-1]
        own = f"{name}-{number}" if number else name
        disks.append(Disk(own, zone, int(about.get("diskSizeGb", 10)), kind, bool(asked.get("autoDelete"))))
    return disks


class Instances:
    """All instances and disks by (zone, name), and the bill of the instances.

    Args:
        build: makes the hardware of a new instance; None for instances without hardware.
        addresses: free addresses.
    """

    def __init__(self, project: str, addresses: Any, build: Callable[[Instance], Hardware] | None) -> None:
        self.project, self.addresses, self.build = project, iter(addresses), build
        self.found: dict[tuple[str, str], Instance] = {}
        self.disks: dict[tuple[str, str], Disk] = {}
        self.bill = Bill()
        self.ids = itertools.count(4_520_031_799_277_581_759)
        self.lock = threading.RLock()

    def running(self) -> list[MachineRequest]:
        with self.lock:
            return [one.request for one in self.found.values() if one.status not in (TERMINATED,)]

    def get(self, zone: str, name: str) -> Instance:
        with self.lock:
            if (zone, name) not in self.found:
                raise not_found(f"projects/{self.project}/zones/{zone}/instances/{name}")
            return self.found[zone, name]

    def create(self, name: str, request: MachineRequest, properties: Json) -> Instance:
        """Adds an instance that does not run yet."""
        scheduling = dict(properties.get("scheduling") or {})
        instance = Instance(
            name=name,
            id=next(self.ids),
            request=request,
            project=self.project,
            address=next(self.addresses),
            spot_action=scheduling.get("instanceTerminationAction", "STOP"),
            labels=dict(properties.get("labels") or {}),
            metadata=list((properties.get("metadata") or {}).get("items") or []),
            tags=list((properties.get("tags") or {}).get("items") or []),
            disks=parse_disks(name, request.zone, properties),
            scheduling=scheduling,
            created=now(),
        )
        with self.lock:
            if (request.zone, name) in self.found:
                raise ApiError(409, "alreadyExists", f"The resource '{name}' already exists")
            self.found[request.zone, name] = instance
            self.disks |= {(disk.zone, disk.name): disk for disk in instance.disks}
        return instance

    def power_on(self, instance: Instance) -> None:
        """Boots it; it costs from the moment it runs."""
        with instance.lock:
            instance.status = "STAGING"
            if self.build:
                instance.hardware = instance.hardware or self.build(instance)
                instance.hardware.boot()
            instance.status, instance.started = RUNNING, now()
            self._turn_over(instance, "started", time.time(), running=True)

    def power_off(self, instance: Instance, why: str) -> None:
        """Stops it at once; its disk stays, and costs."""
        with instance.lock:
            self._cut_power(instance, why, running=False)

    def delete(self, instance: Instance, why: str) -> None:
        """Deletes it with its auto-delete disks."""
        with instance.lock:
            self._cut_power(instance, why, running=None)
            if instance.hardware:
                instance.hardware.discard()
            with self.lock:
                self.found.pop((instance.request.zone, instance.name), None)
                for disk in instance.disks:
                    if disk.auto_delete:
                        self.disks.pop((disk.zone, disk.name), None)

    def _cut_power(self, instance: Instance, why: str, *, running: bool | None) -> None:
        """The time that this computer takes for it, and to remove a disk, is not billed."""
        at = time.time()
        if instance.hardware:
            instance.hardware.power_off()
        instance.status = TERMINATED
        self._turn_over(instance, why, at, running=running)

    def end_spot(self, instance: Instance, why: str) -> None:
        """Deletes or stops a preempted spot machine, as was requested when it was created."""
        with self.lock:
            still = self.found.get((instance.request.zone, instance.name)) is instance
        if still and instance.status != TERMINATED:
            (self.delete if instance.spot_action == "DELETE" else self.power_off)(instance, why)

    def _turn_over(self, instance: Instance, why: str, at: float, *, running: bool | None) -> None:
        """Ends the current stretch of the bill and begins the next; running None begins none."""
        if instance.stretch and instance.stretch.ended is None:
            instance.stretch.ended, instance.stretch.end = at, why
        if running is None:
            return
        request = instance.request
        instance.stretch = Stretch(
            instance.name,
            request.zone,
            request.machine_type,
            request.gpu,
            request.gpus,
            request.spot,
            instance.disk_gb,
            running,
            at,
        )
        self.bill.stretches.append(instance.stretch)
