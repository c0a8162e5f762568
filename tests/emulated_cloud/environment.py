"""The whole test environment: an emulated Google Cloud with its machines and buckets, and the real SkyPilot pointed at it."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune.cloud.catalog.csv_file import VMS
from tests.emulated_cloud import machine_image
from tests.emulated_cloud.buckets import PORT as BUCKET_PORT
from tests.emulated_cloud.buckets import Buckets
from tests.emulated_cloud.gce import Cloud
from tests.emulated_cloud.gce_instances import parse_request
from tests.emulated_cloud.machine import Machine, Site, open_site
from tests.emulated_cloud.machine_project import prepare_project
from tests.emulated_cloud.orphans import clean, close_site, sky_user, take_slot
from tests.emulated_cloud.pace import PACE
from tests.emulated_cloud.skypilot import PROJECT, SkyPilot, environment, make_home
from tests.helpers.catalog_fixture import CATALOG

API_PORT = 8080
IMAGE_VARIABLE = "FT_CLOUD_IMAGE"
"""A folder that keeps the machines' image between sessions; without it each session makes its own, in about a minute."""


@dataclass
class CloudEnvironment:
    """The emulated Google Cloud and the SkyPilot that uses it. seconds: how long each step of the preparation took."""

    cloud: Cloud
    buckets: Buckets
    sky: SkyPilot
    site: Site
    seconds: dict[str, float] = field(default_factory=dict)

    def empty(self) -> None:
        """Removes all machines and disks, empties the bill, and clears every fault and restriction that a test has set."""
        self.all_well()
        self.cloud.wipe()
        self.cloud.prices.reset()
        self.cloud.bill.stretches.clear()
        self.cloud.calls.clear()

    def all_well(self) -> None:
        """Clears every fault that a test has set; machines stay."""
        self.site.write_back = self.site.upload_bytes_per_second = self.site.disk_bytes = 0
        self.buckets.allow()
        self.cloud.faults.clear()
        self.sky.expire_login(False)
        for instance in self.cloud.machines():
            if isinstance(instance.hardware, Machine) and instance.hardware.booted:
                self.cloud.reconnect(instance)

    def machine(self, cluster: str = "") -> Machine:
        """The hardware of the newest running machine."""
        hardware = self.cloud.machine(cluster).hardware
        assert isinstance(hardware, Machine)
        return hardware

    def asked_for(self) -> list[tuple[str, bool, str]]:
        """(GPU, spot, zone) of every machine that SkyPilot has requested, in order."""
        calls = [call for call in self.cloud.calls if call.path.endswith("/bulkInsert")]
        zones = [call.path.split("/zones/")[1].split("/")[0] for call in calls]
        requests = [
            parse_request(zone, call.body["instanceProperties"]) for zone, call in zip(zones, calls, strict=True)
        ]
        return [(request.gpu, request.spot, request.zone) for request in requests]


@contextmanager
def emulated_environment() -> Iterator[CloudEnvironment]:
    """Everything is removed at the end of the block; what a killed session has left is removed by the next one."""
    PACE.learn()
    with ExitStack() as at_end:
        slot, folder = take_slot()
        at_end.callback(clean, slot)
        seconds: dict[str, float] = {}
        image = Path(os.environ.get(IMAGE_VARIABLE) or folder / "image").resolve()
        image.mkdir(parents=True, exist_ok=True)
        site = Site(slot, folder / "machines", image / "layer" / "layer" / "upper", api="", bucket="")
        site.api, site.bucket = f"http://{site.google}:{API_PORT}", f"http://{site.google}:{BUCKET_PORT}"
        home = folder / "home"
        home.mkdir()
        make_home(home, sky_user(slot))
        with timed(seconds, "bridge"):
            open_site(site)
            at_end.callback(close_site, slot)
        packages = image / "packages"
        packages.mkdir(exist_ok=True)
        with timed(seconds, "bucket"), alone(packages):  # one session at a time installs them
            buckets = Buckets(site.google, folder / "bucket", packages)
            at_end.callback(buckets.stop)
        env = environment(home, site.api, site.bucket)
        cloud = Cloud(
            (site.google, API_PORT),
            PROJECT,
            catalog_zones(home),
            site.machine_addresses(),
            lambda one: Machine(site, one),
        )
        cloud.prices.reset((home / CATALOG / VMS).read_text(encoding="utf-8"))
        at_end.enter_context(cloud)
        sky = SkyPilot(home, env)
        at_end.callback(sky.stop)
        with ThreadPoolExecutor(1) as beside:  # SkyPilot's start and the image do not depend on each other
            started = beside.submit(start, sky, seconds)
            with timed(seconds, "image"), alone(image):  # sessions may share the image
                reuse_wheel(image, home)
                machine_image.prepare(image / "layer", home, env)
                keep_wheel(image, home)
                prepare_project(image / "layer")
            started.result()
        yield CloudEnvironment(cloud, buckets, sky, site, seconds)


def start(sky: SkyPilot, seconds: dict[str, float]) -> None:
    with timed(seconds, "API server"):
        sky.start()
    with timed(seconds, "sky check"):
        sky.run("check", "gcp").ok()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A lock on the folder, held by one process at a time."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - began, 1)


def catalog_zones(home: Path) -> list[str]:
    with (home / CATALOG / VMS).open(encoding="utf-8", newline="") as file:
        return sorted({row["AvailabilityZone"] for row in csv.DictReader(file) if row["AvailabilityZone"]})


def reuse_wheel(image: Path, home: Path) -> None:
    """SkyPilot builds its wheel for the machines in about ten seconds, unless its home has one that is newer than its source."""
    if (image / "wheels").is_dir():
        shutil.copytree(image / "wheels", home / ".sky" / "wheels", copy_function=shutil.copy2)


def keep_wheel(image: Path, home: Path) -> None:
    shutil.rmtree(image / "wheels", ignore_errors=True)
    shutil.copytree(home / ".sky" / "wheels", image / "wheels", copy_function=shutil.copy2)
