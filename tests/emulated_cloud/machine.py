"""One emulated machine: a chroot over the image with its own network, processes, mounts and name, a real sshd, a metadata server.

It shares this computer's kernel: the clocks since boot are the computer's, and `df` shows the computer's disk unless the site
gives its machines disks of a size.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_cloud.gce_instances import Instance
from tests.emulated_cloud.machine_image import USER
from tests.emulated_cloud.machine_metadata import ADDRESS, MachineMetadata
from tests.emulated_cloud.machine_process import Booted

Json = dict[str, Any]
INTERFACES = itertools.count(1)
SSHD = ["/usr/sbin/sshd", "-D", "-e"]
FILLER = "/var/filler"
CUTS = ("laptop", "google", "all")


@dataclass
class Site:
    """Where machines stand. slot: tells sessions of tests on this computer apart, in names and addresses.

    layer: the image; folder: for the machines' disks; bucket: the storage API's address; write_back: seconds after which a
    closed file is uploaded, 0 at its closing. upload_bytes_per_second: 0 for as fast as it goes. disk_bytes: room on a machine's
    disk beside the image, 0 for what this computer has; such a disk is memory, and gone when the machine is off. These hold for
    machines that boot from then on.
    """

    slot: int
    folder: Path
    layer: Path
    api: str
    bucket: str
    write_back: float = 0
    upload_bytes_per_second: int = 0
    disk_bytes: int = 0

    @property
    def bridge(self) -> str:
        return f"ft-bridge{self.slot}"

    @property
    def link_address(self) -> str:
        """Of the bridge; 02 is for addresses that no manufacturer has given."""
        return f"02:66:74:00:00:{self.slot:02x}"

    def address(self, number: int) -> str:
        return f"10.128.{16 * self.slot + number // 256}.{number % 256}"

    @property
    def laptop(self) -> str:
        return self.address(1)

    @property
    def google(self) -> str:
        return self.address(2)

    def machine_addresses(self) -> list[str]:
        return [self.address(number) for number in range(10, 4000) if number % 256 not in (0, 255)]


def open_site(site: Site) -> None:
    """The bridge that the machines hang on, with the addresses of SkyPilot's computer and of Google's services.

    Its link address is set by hand: left alone it is that of one of the machines, changes when one comes or goes, and the others
    talk to the old one until they ask again, for up to a minute.
    """
    for command in (
        f"ip link add {site.bridge} address {site.link_address} type bridge",
        f"ip address add {site.laptop}/20 dev {site.bridge}",
        f"ip address add {site.google}/20 dev {site.bridge}",
        f"ip link set {site.bridge} up",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)


class Machine:
    """The hardware of an instance (gce_instances.Hardware). Raises AssertionError with its log if it does not start."""

    def __init__(self, site: Site, instance: Instance) -> None:
        self.site, self.instance = site, instance
        self.folder = site.folder / instance.name
        self.disk_bytes = site.disk_bytes
        self.metadata = MachineMetadata(
            **{
                "id": str(instance.id),
                "name": instance.name,
                "hostname": instance.name,
                "zone": f"projects/123456789/zones/{instance.request.zone}",
                "machine-type": f"projects/123456789/machineTypes/{instance.request.machine_type}",
                "scheduling/preemptible": str(instance.request.spot).upper(),
                "preempted": "FALSE",
                "maintenance-event": "NONE",
            }
        )
        self.booted: Booted | None = None
        self.interface = ""

    @property
    def upper(self) -> Path:
        """What the machine has written on its disk, as it lies on this computer; nothing of a disk of limited size."""
        return self.folder / "upper"

    def boot(self) -> None:
        self.metadata.set("preempted", "FALSE")
        network = {"address": f"{self.instance.address}/20", "gateway": self.site.laptop, "metadata": ADDRESS}
        settings = {
            "name": self.instance.name,
            "folder": str(self.folder),
            "image": str(self.site.layer),
            "disk_bytes": self.disk_bytes,
            "network": network,
            "services": [SSHD],
            "files": self._files(),
            "env": {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        }
        self.booted = Booted(settings, own_network=True)
        self.interface = f"ft{self.site.slot}v{next(INTERFACES)}"
        inside = ["type", "veth", "peer", "name", "eth0", "netns", str(self.booted.init)]
        self._ip("link", "add", self.interface, *inside)
        self._ip("link", "set", self.interface, "master", self.site.bridge, "up")
        self.booted.boot()
        self.metadata.start(self.booted.init)

    def _files(self) -> list[Json]:
        keys = [item["value"] for item in self.instance.metadata if item["key"] == "ssh-keys"]
        lines = [line.partition(":")[2] for value in keys for line in value.splitlines() if line.startswith(f"{USER}:")]
        request, name, home = self.instance.request, self.instance.name, f"/home/{USER}"
        about = {"gpus": [request.gpu] * request.gpus, "api": self.site.api, "project": self.instance.project}
        bucket = f"BUCKET_ENDPOINT={self.site.bucket}\nBUCKET_WRITE_BACK={self.site.write_back}\n"
        bucket += f"BUCKET_BYTES_PER_SECOND={self.site.upload_bytes_per_second}\n"
        hosts = f"127.0.0.1 localhost\n{self.instance.address} {name}\n{ADDRESS} metadata.google.internal metadata\n"
        return [
            {"path": "/etc/ft-machine.json", "text": json.dumps(about)},
            {"path": "/etc/ft-machine.env", "text": bucket},
            {"path": "/etc/hostname", "text": name + "\n"},
            {"path": "/etc/hosts", "text": hosts},
            {"path": "/etc/resolv.conf", "text": ""},
            {"path": f"{home}/.ssh/authorized_keys", "text": "\n".join([*lines, ""]), "user": USER},
        ]

    def power_off(self) -> None:
        self.metadata.stop()
        if self.booted:
            self.booted.power_off()
            self.booted = None
        if self.interface:  # it would go with the last process, a second or two later
            self._ip("link", "delete", self.interface, check=False)
            self.interface = ""

    def notice(self) -> None:
        """The cloud says that it takes the machine back."""
        self.metadata.set("preempted", "TRUE")
        self.metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")

    def shut_down(self) -> None:
        """What the system does when its power button is pressed: SIGTERM to all that runs."""
        if self.booted:
            self.booted.say("terminate")

    def cut(self, what: str) -> None:
        assert self.booted and what in CUTS, f"{what}: expected one of {', '.join(CUTS)}"
        if what == "all":
            self._ip("link", "set", self.interface, "down")
        else:
            self._route("add", self.site.laptop if what == "laptop" else self.site.google)

    def reconnect(self) -> None:
        self._ip("link", "set", self.interface, "up")
        for address in (self.site.laptop, self.site.google):
            self._route("delete", address, check=False)

    def fill_disk(self, leave: int = 0) -> None:
        """Up to so many bytes, by a file of root's; only a disk of limited size."""
        assert self.booted and self.disk_bytes, "this machine's disk is this computer's"
        room = int(self.booted.run(["df", "--output=avail", "--block-size=1", "/var"]).stdout.split()[-1])
        # so much and no more: what is given back meanwhile is not to be taken too
        self.booted.run(["sh", "-c", f"head -c {max(room - leave, 1)} /dev/zero >>{FILLER}"])

    def free_disk(self) -> None:
        assert self.booted
        self.booted.run(["rm", "-f", FILLER])

    def discard(self) -> None:
        """Its disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _route(self, verb: str, address: str, *, check: bool = True) -> None:
        assert self.booted
        enter = ["nsenter", "--target", str(self.booted.init), "--net"]
        subprocess.run([*enter, "ip", "route", verb, "blackhole", f"{address}/32"], check=check, capture_output=True)

    @staticmethod
    def _ip(*arguments: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
