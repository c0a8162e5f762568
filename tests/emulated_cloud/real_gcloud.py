"""Google's own `gcloud` for the tests on a real project: lists and deletes machines, reads the bucket."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.emulated_cloud.gce_instances import parse_request
from tests.emulated_cloud.gce_market import MachineRequest

Json = dict[str, Any]
OURS = re.compile("[a-z][a-z0-9-]+-")
"""A valid prefix of this session's cluster names: it becomes part of a regular expression in a gcloud filter."""
NO_OBJECTS = "matched no objects"


@dataclass(frozen=True)
class RealMachine:
    """A row of `gcloud compute instances list`. began: its last start, in seconds since the epoch; ended: its last stop."""

    name: str
    request: MachineRequest
    status: str
    disk_gb: int
    began: float
    ended: float | None


def machine_of(row: Json) -> RealMachine:
    """From Google's JSON of an instance."""
    ended = row.get("lastStopTimestamp")
    return RealMachine(
        name=row["name"],
        request=parse_request(row["zone"].rpartition("/")[2], row),
        status=row["status"],
        disk_gb=sum(int(disk.get("diskSizeGb", 0)) for disk in row.get("disks", [])),
        began=seconds_of(row.get("lastStartTimestamp") or row["creationTimestamp"]),
        ended=seconds_of(ended) if ended else None,
    )


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


class Gcloud:
    """Every call names the project and never prompts. program: for tests of this module."""

    def __init__(self, project: str, program: str = "gcloud") -> None:
        self.project, self.program = project, program

    def run(self, *words: str, seconds: float = 180) -> subprocess.CompletedProcess[bytes]:
        command = [self.program, "--quiet", *words, f"--project={self.project}"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)

    def say(self, *words: str, seconds: float = 180) -> bytes:
        """Runs it and returns its standard output. Raises AssertionError with its error message."""
        done = self.run(*words, seconds=seconds)
        complaint = done.stderr.decode(errors="replace")[-2000:]
        assert done.returncode == 0, f"gcloud {' '.join(words)}: exit code {done.returncode}\n{complaint}"
        return done.stdout

    def machines(self, prefix: str) -> list[RealMachine]:
        """Machines whose name begins with the prefix, stopped ones included, oldest first."""
        rows = self._list("compute", "instances", "list", prefix=prefix)
        return sorted((machine_of(row) for row in rows), key=lambda machine: machine.began)

    def disks(self, prefix: str) -> list[str]:
        return [row["name"] for row in self._list("compute", "disks", "list", prefix=prefix)]

    def _list(self, *words: str, prefix: str) -> list[Json]:
        assert OURS.fullmatch(prefix), f"{prefix}: not a prefix of this session"
        found: list[Json] = json.loads(self.say(*words, "--format=json", f"--filter=name~^{prefix}") or b"[]")
        return [row for row in found if row["name"].startswith(prefix)]  # not relying on gcloud's filter alone

    def preempt(self, machine: RealMachine) -> None:
        """Google's simulated host maintenance, which preempts a spot machine: notice, 30 seconds, the end.

        https://cloud.google.com/compute/docs/instances/simulating-host-maintenance. Returns when it has begun: gcloud
        itself would wait for the end, and then fail, because it looks for the machine once more (gcloud 528).
        """
        place = f"--zone={machine.request.zone}"
        self.say("compute", "instances", "simulate-maintenance-event", machine.name, place, "--async")

    def delete(self, machine: RealMachine) -> None:
        self.say("compute", "instances", "delete", machine.name, f"--zone={machine.request.zone}", seconds=600)


class RealBuckets:
    """A single bucket under any name: `training.BUCKET` stands for the bucket of this project and user."""

    def __init__(self, gcloud: Gcloud, bucket: str, alias: str) -> None:
        self.gcloud, self.bucket, self.alias = gcloud, bucket, alias
        self._there = False  # cached once seen, because each gcloud call takes a second

    def names(self) -> list[str]:
        """The alias, if the bucket exists."""
        if not self._there:
            words = ("storage", "buckets", "describe", f"gs://{self.bucket}", "--format=value(name)")
            self._there = self.gcloud.run(*words).returncode == 0
        return [self.alias] if self._there else []

    def objects(self, bucket: str, prefix: str = "") -> list[str]:
        place = f"gs://{self.bucket}/"
        done = self.gcloud.run("storage", "ls", f"{place}{prefix}**")
        complaint = done.stderr.decode(errors="replace")
        assert done.returncode == 0 or NO_OBJECTS in complaint, complaint[-2000:]
        lines = done.stdout.decode().splitlines()
        return sorted(line.removeprefix(place) for line in lines if line.startswith(place))

    def read(self, bucket: str, name: str) -> bytes:
        return self.gcloud.say("storage", "cat", f"gs://{self.bucket}/{name}")

    def updated(self, bucket: str, name: str) -> float:
        """When the object was last written, in seconds since the epoch, by the bucket's clock."""
        words = ("storage", "objects", "describe", f"gs://{self.bucket}/{name}", "--raw", "--format=value(updated)")
        return seconds_of(self.gcloud.say(*words).decode().strip())

    def fetch(self, prefix: str, folder: Path) -> Path:
        """A copy of a folder of the bucket inside `folder`."""
        place = prefix.rstrip("/")
        self.gcloud.say("storage", "cp", "--recursive", f"gs://{self.bucket}/{place}", str(folder), seconds=600)
        return folder / place.rpartition("/")[2]
