"""A session that is killed leaves things behind; the next one removes them, and only them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import leftovers
import pytest

pytestmark = pytest.mark.cloud
HERE = Path(__file__).resolve().parent

KILLED = """\
import sys, time
sys.path[:0] = {paths!r}
import subprocess
from pathlib import Path
from gce import Cloud
from leftovers import take_slot
from machine import Machine, Site, open_site
slot, folder = take_slot()
layer = Path({layer!r})
site = Site(slot, folder / "machines", layer, "", "")
open_site(site)
cloud = Cloud((site.google, 8080), "p", ["us-central1-a"], site.machine_addresses(), lambda one: Machine(site, one))
from gce_instances import parse_wish
wish = parse_wish("us-central1-a", {{"machineType": "n1-standard-8"}})
cloud.instances.power_on(cloud.instances.create("one-compute", wish, {{}}))
subprocess.Popen(["sleep", "1000"], env={{"HOME": str(folder / "home"), "PATH": "/bin:/usr/bin"}}, start_new_session=True)
print(slot, cloud.machine().hardware.booted.init, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_session_left_is_removed(bare_image: Path) -> None:
    script = KILLED.format(paths=[str(HERE), str(HERE.parent), str(HERE.parents[1])], layer=str(bare_image))
    session = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert session.stdout
    slot, init = (int(word) for word in session.stdout.readline().split())
    folder = leftovers.place(slot)
    assert Path(f"/proc/{init}").exists() and Path(f"/sys/class/net/ft-bridge{slot}").exists()
    other, _ = leftovers.take_slot()
    assert other != slot and folder.exists(), "it is not touched as long as it lives"
    leftovers.clean(other)
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{init}/ns/pid").exists():
        assert time.monotonic() < deadline, "the machine outlives its session"
        time.sleep(0.05)
    assert len(leftovers.ours(folder)) == 1, "the server, as it were"
    assert Path(f"/sys/class/net/ft-bridge{slot}").exists() and folder.exists()
    bystander = subprocess.Popen(["sleep", "100"], env={"HOME": str(folder) + "-not", "PATH": "/bin:/usr/bin"})
    again, _ = leftovers.take_slot()
    assert again == slot or not folder.exists()
    assert not leftovers.ours(folder) and not Path(f"/sys/class/net/ft-bridge{slot}").exists()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    leftovers.clean(again)
    assert not Path(tempfile.gettempdir(), f"ft-cloud-{again}").exists()
