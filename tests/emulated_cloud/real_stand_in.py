"""Stand-ins for `gcloud` and `sky` in tests of the code for a real project: they record calls and answer for a made-up
project."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
GCLOUD = """\
#!{python}
import json, pathlib, sys
folder, words = pathlib.Path({folder!r}), [word for word in sys.argv[1:] if word != "--quiet"]
with (folder / "calls").open("a") as log:
    log.write(json.dumps(["gcloud", *sys.argv[1:]]) + "\\n")
state = json.loads((folder / "state").read_text())
what, place = " ".join(words[:3]), words[3] if len(words) > 3 else ""
if what == "compute instances list" and state["silent"]:
    (folder / "state").write_text(json.dumps(state | dict(silent=state["silent"] - 1)))
    sys.exit("ERROR: (gcloud.compute.instances.list) the network is unreachable")
elif what == "compute instances list":  # --filter is ignored: the caller has to filter as well
    print(json.dumps(state["machines"]))
elif what == "compute disks list":
    print(json.dumps([dict(name=name) for name in state["disks"]]))
elif what in ("compute instances delete", "compute instances simulate-maintenance-event"):
    state["machines"] = [row for row in state["machines"] if row["name"] != place]
    (folder / "state").write_text(json.dumps(state))
elif words[:2] == ["storage", "ls"]:
    found = [url for url in state["objects"] if url.startswith(words[2].removesuffix("**"))]
    print("\\n".join(found)) if found else sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
elif words[:2] == ["storage", "cat"]:
    print(state["objects"][words[2]], end="")
elif what == "storage objects describe":
    print("2026-11-23T05:00:01.500000+00:00")
elif what == "storage buckets describe":
    sys.exit(0 if place in state["buckets"] else "ERROR: (gcloud.storage.buckets.describe) not found: 404.")
else:
    sys.exit("ERROR: (gcloud) not in the stand-in: " + " ".join(words))
"""
SKY = """\
#!{python}
import json, pathlib, sys, time
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
with (folder / "calls").open("a") as log:
    log.write(json.dumps(["sky", *words]) + "\\n")
state = json.loads((folder / "state").read_text())
if words[0] == "launch":
    time.sleep(state["launch_seconds"])
elif words[0] == "down":
    time.sleep(state["down_seconds"])
    if words[-1] in state["stubborn"]:
        sys.exit("ERROR: the API server does not answer")
    state["machines"] = [row for row in state["machines"] if not row["name"].startswith(words[-1])]
    (folder / "state").write_text(json.dumps(state))
"""
EMPTY: Json = {
    "machines": [],
    "disks": [],
    "objects": {},
    "buckets": [],
    "stubborn": [],
    "silent": 0,
    "launch_seconds": 0,
    "down_seconds": 0,
}


def instance(name: str, zone: str, machine: str, *, spot: bool = True, status: str = "RUNNING", gpu: str = "") -> Json:
    """An instance in the JSON of the compute API, which gcloud's --format=json prints."""
    root = f"https://www.googleapis.com/compute/v1/projects/p/zones/{zone}"
    stopped = {"lastStopTimestamp": "2026-11-22T21:30:00.000-08:00"} if status == "TERMINATED" else {}
    gpus = [{"acceleratorCount": 1, "acceleratorType": f"{root}/acceleratorTypes/{gpu}"}] if gpu else []
    return {
        "name": name,
        "zone": root,
        "status": status,
        "machineType": f"{root}/machineTypes/{machine}",
        "creationTimestamp": "2026-11-22T20:59:00.000-08:00",
        "lastStartTimestamp": "2026-11-22T21:00:00.000-08:00",
        **stopped,
        "guestAccelerators": gpus,
        "disks": [{"boot": True, "diskSizeGb": "200"}],
        "scheduling": {"preemptible": spot, "provisioningModel": "SPOT" if spot else "STANDARD"},
        "labels": {"ray-cluster-name": name},
    }


@dataclass(frozen=True)
class StandIn:
    """The programs are in `bin`."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def lay_out(self, **state: object) -> StandIn:
        """state: values that differ from EMPTY."""
        self.bin.mkdir(parents=True, exist_ok=True)
        for name, text in (("gcloud", GCLOUD), ("sky", SKY)):
            (self.bin / name).write_text(text.format(python=sys.executable, folder=str(self.folder)))
            (self.bin / name).chmod(0o755)
        (self.folder / "state").write_text(json.dumps(EMPTY | state))
        return self

    @property
    def gcloud(self) -> str:
        return str(self.bin / "gcloud")

    def env(self) -> dict[str, str]:
        return dict(os.environ) | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def calls(self, program: str = "") -> list[str]:
        """All calls in order, each as its words joined by spaces."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [text for line in lines if (text := " ".join(json.loads(line))).startswith(program)]

    def wait_for(self, call: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(one.startswith(call) for one in self.calls()):
            assert time.monotonic() < deadline, f"no call of {call}; there are {self.calls()}"
            time.sleep(0.1)

    def machines(self) -> list[str]:
        return [row["name"] for row in json.loads((self.folder / "state").read_text())["machines"]]
