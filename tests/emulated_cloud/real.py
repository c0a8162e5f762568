"""A real Google Cloud project in place of the emulated one: the part of `environment.CloudEnvironment` that a real cloud can
provide.

Machines are seen and preempted through `gcloud`, the bucket through `gcloud storage`, and SkyPilot is the user's own. Nothing
here touches resources whose names do not begin with this session's prefix. See docs/emulated-cloud.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import TimeoutExpired

from tests.emulated_cloud.real_bill import RealBill
from tests.emulated_cloud.real_gcloud import Gcloud, RealBuckets, RealMachine
from tests.emulated_cloud.real_sky import RealSky, take_down

LOOK_SECONDS = 5.0
"""Between two listings of the machines; each takes another second or two."""
RUNNING = "RUNNING"


class RealCloud:
    """The methods of `gce.Cloud` that a real cloud can provide. With `watching` it keeps the bill."""

    def __init__(self, gcloud: Gcloud, prefix: str) -> None:
        self.gcloud, self.prefix, self.bill = gcloud, prefix, RealBill()
        self._over = threading.Event()

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"{name}: only the emulated cloud has it, not a real project")

    def machines(self, cluster: str = "") -> list[RealMachine]:
        """This session's machines, stopped ones included, newest last. cluster: the beginning of SkyPilot's name for it."""
        found = self.gcloud.machines(self.prefix)
        self.bill.observe(found)
        return [machine for machine in found if machine.name.startswith(cluster)]

    def machine(self, cluster: str = "") -> RealMachine:
        """The newest running machine. Raises AssertionError if there is none."""
        found = self.machines(cluster)
        running = [machine for machine in found if machine.status == RUNNING]
        assert running, f"no machine {cluster} runs; there are {[(one.name, one.status) for one in found]}"
        return running[-1]

    def wait_for_machine(
        self, cluster: str = "", seconds: float = 1200, *, other_than: RealMachine | None = None
    ) -> RealMachine:
        """Waits until a machine runs that is not `other_than`, by name, and returns it."""
        deadline = time.monotonic() + seconds
        while True:
            found = [one for one in self.machines(cluster) if one.status == RUNNING]
            others = [one for one in found if other_than is None or one.name != other_than.name]
            if others or time.monotonic() > deadline:
                return others[-1] if others else self.machine(cluster)
            time.sleep(LOOK_SECONDS)

    def preempt(self, machine: RealMachine) -> None:
        """Google's simulated preemption, with a notice of 30 s; returns when it has begun."""
        self.gcloud.preempt(machine)

    def crash(self, machine: RealMachine) -> None:
        """Deletes it from outside. Google still lets its system shut down, so its processes do get a SIGTERM."""
        self.gcloud.delete(machine)

    def assert_empty(self, seconds: float = 600) -> None:
        """Raises AssertionError if a machine or disk of this session is left after that time."""
        deadline = time.monotonic() + seconds
        while (left := self.machines()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        assert not left, f"left in the cloud: {[(one.name, one.request.zone, one.status) for one in left]}"
        disks = self.gcloud.disks(self.prefix)
        assert not disks, f"disks left in the cloud: {disks}"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Lists the machines regularly while the block runs, which keeps the bill."""
        self._over.clear()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(timeout=60)
            self.machines()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                self.machines()
            except (AssertionError, TimeoutExpired) as error:  # a short network failure; the next listing catches up
                print(f"machines could not be listed: {error}")


@dataclass
class RealEnvironment:
    """What a scenario works with."""

    cloud: RealCloud
    buckets: RealBuckets
    sky: RealSky

    def name(self, name: str) -> str:
        """The name of a cluster, job or run with this session's prefix."""
        return self.sky.prefix + name

    @contextmanager
    def scenario(self, minutes: float) -> Iterator[None]:
        """Watches the machines, and takes down what was launched in the block at its end or after `minutes`."""
        timer = threading.Timer(60 * minutes, self._time_is_up, args=(minutes,))
        timer.daemon = True
        timer.start()
        try:
            with self.cloud.watching():
                try:
                    yield
                finally:
                    timer.cancel()
                    self.take_down()
        finally:
            timer.cancel()

    def take_down(self) -> None:
        print("\n".join(take_down(self.sky, self.cloud.gcloud)))

    def _time_is_up(self, minutes: float) -> None:
        print(f"the {minutes:.0f} minutes are over: the machines are taken down, finished or not")
        self.take_down()
