"""An emulated Google Cloud: the API that SkyPilot calls, and the faults that tests inject.

with Cloud(("10.128.15.254", 8080), "project", zones, addresses, build) as cloud:
    cloud.market.set_stock(0, gpu="A100", spot=True)              # out of stock everywhere
    cloud.market.set_quota("GPUS_ALL_REGIONS", 0)
    cloud.faults.add("bulkInsert", 503, "backendError", seconds=60)
    cloud.preempt(cloud.machine("train"), notice=2)
    cloud.bill.usd(price)
    cloud.assert_empty()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from tests.emulated_cloud.gce_bill import Bill
from tests.emulated_cloud.gce_compute import Compute
from tests.emulated_cloud.gce_http import ApiServer, Call, Faults, route
from tests.emulated_cloud.gce_instances import RUNNING, STOPPING, TERMINATED, Hardware, Instance, Instances
from tests.emulated_cloud.gce_market import Market
from tests.emulated_cloud.gce_prices import PATH, PriceList
from tests.emulated_cloud.gce_project import Project
from tests.emulated_cloud.pace import wait_until

NOTICE_SECONDS = 30.0
"""Between Google's notice of a preemption and the power cut."""


class Cloud:
    """See the module. market: stock and quotas; faults: API errors and latency; project: permissions; prices: the
    published catalog; bill: what was used."""

    def __init__(
        self,
        address: tuple[str, int],
        project: str,
        zones: Iterable[str],
        addresses: Iterable[str],
        build: Callable[[Instance], Hardware] | None = None,
    ) -> None:
        self.market, self.faults, self.project = Market(), Faults(), Project(project)
        self.prices = PriceList()
        self.instances = Instances(project, addresses, build)
        self.compute = Compute(project, self.instances, self.market, sorted(set(zones)))
        published = (route("GET", PATH), lambda call: self.prices.text)
        self.server = ApiServer(address, [*self.compute.routes(), *self.project.routes(), published], self.faults)

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.wipe("the test is over")

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def bill(self) -> Bill:
        return self.instances.bill

    @property
    def calls(self) -> list[Call]:
        return self.server.calls

    @property
    def defects(self) -> list[str]:
        """Calls that the emulation does not implement, and errors in the emulation itself: SkyPilot may have gone on to the next
        zone because of them, and the test would not notice."""
        return [*self.server.defects, *self.compute.operations.defects]

    def machines(self, cluster: str = "") -> list[Instance]:
        """Existing machines, stopped ones included, newest last. cluster: the beginning of SkyPilot's name for it."""
        with self.instances.lock:
            return [one for one in self.instances.found.values() if one.name.startswith(cluster)]

    def machine(self, cluster: str = "") -> Instance:
        """The newest running machine. Raises AssertionError if there is none."""
        found = [one for one in self.machines(cluster) if one.status == RUNNING]
        assert found, f"no machine {cluster} runs; {self._state()}"
        return found[-1]

    def _state(self) -> str:
        """For a failure message: the machines that exist, and the last calls of the API."""
        there = [(one.name, one.request.zone, one.status) for one in self.machines()]
        last = [(time.strftime("%X", time.localtime(call.at)), call.method, call.path) for call in self.calls[-30:]]
        return "\n".join([f"machines: {there}; last calls of the API:", *map(" ".join, last)])

    def wait_for_machine(
        self, cluster: str = "", seconds: float = 120, *, other_than: Instance | None = None
    ) -> Instance:
        """Waits until a machine runs that is not `other_than`, and returns it."""
        found: list[Instance] = []

        def ready() -> bool:
            found[:] = [one for one in self.machines(cluster) if one.status == RUNNING and one is not other_than]
            return bool(found)

        there = "no other machine" if other_than else "no machine"
        wait_until(ready, seconds, lambda waited: f"{there} {cluster} after {waited:.0f} s; {self._state()}", every=0.1)
        return found[-1]

    def preempt(self, instance: Instance, notice: float = NOTICE_SECONDS) -> threading.Thread:
        """As Google does it: notice on the metadata server, SIGTERM to all processes, then the power is cut.

        notice: seconds between notice and power cut. Returns the thread that does this; join it to wait for the end.
        """

        def carry_out() -> None:
            with instance.lock:
                if instance.status != RUNNING:
                    return
                instance.status = STOPPING
            if instance.hardware:
                instance.hardware.notice()
                instance.hardware.shut_down()
            time.sleep(notice)
            self.instances.end_spot(instance, "preempted")

        thread = threading.Thread(target=carry_out, daemon=True)
        thread.start()
        return thread

    def crash(self, instance: Instance, *, gone: bool = True) -> None:
        """The power is cut without notice. gone: the machine is deleted, as a spot machine is; otherwise it is stopped."""
        if gone:
            self.instances.end_spot(instance, "crashed")
        else:
            self.instances.power_off(instance, "crashed")

    def cut_off(self, instance: Instance, what: str = "laptop") -> None:
        """Cuts the network. what: "laptop" (SkyPilot cannot reach it), "google" (it reaches neither API nor bucket), or "all"."""
        assert instance.hardware
        instance.hardware.cut(what)

    def reconnect(self, instance: Instance) -> None:
        assert instance.hardware
        instance.hardware.reconnect()

    def assert_empty(self, seconds: float = 20) -> None:
        """Raises AssertionError if a machine or disk is left after that time."""
        wait_until(lambda: not self.machines(), seconds, lambda _: f"left in the cloud; {self._state()}", every=0.1)
        assert not self.compute.disks(), f"disks left in the cloud: {self.compute.disks()}"

    def wipe(self, why: str = "wiped") -> None:
        """Removes everything that exists, and clears whatever a test has set."""
        for instance in self.machines():
            self.instances.delete(instance, why)
        self.instances.disks.clear()
        self.server.defects.clear()
        self.compute.operations.defects.clear()
        self.market.reset()
        self.faults.clear()
        self.project.denied.clear()
        self.compute.boot_seconds = 0.0


__all__ = ["RUNNING", "TERMINATED", "Cloud", "Instance"]
