"""A session that is killed leaves orphans behind; the next one removes those and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulated_cloud import orphans

HERE = Path(__file__).resolve().parent

KILLED = """\
import sys, time
sys.path[:0] = [{root!r}]
import subprocess
from pathlib import Path
from tests.emulated_cloud.gce import Cloud
from tests.emulated_cloud.orphans import take_slot
from tests.emulated_cloud.machine import Machine, Site, open_site
slot, folder = take_slot()
layer = Path({layer!r})
site = Site(slot, folder / "machines", layer, "", "")
open_site(site)
cloud = Cloud((site.google, 8080), "p", ["us-central1-a"], site.machine_addresses(), lambda one: Machine(site, one))
from tests.emulated_cloud.gce_instances import parse_request
request = parse_request("us-central1-a", {{"machineType": "n1-standard-8"}})
cloud.instances.power_on(cloud.instances.create("one-compute", request, {{}}))
path = {{"PATH": "/bin:/usr/bin"}}
subprocess.Popen(["sleep", "1000"], env=path | {{"HOME": str(folder / "home")}}, start_new_session=True)
titled = ["SkyPilot:executor", "1000"]
subprocess.Popen(titled, executable="/bin/sleep", env=path, cwd=folder / "machines", start_new_session=True)
print(slot, cloud.machine().hardware.booted.init, flush=True)
time.sleep(1000)
"""


@pytest.mark.cloud
def test_what_a_killed_session_left_is_removed(bare_image: Path) -> None:
    script = KILLED.format(root=str(HERE.parents[1]), layer=str(bare_image))
    session = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert session.stdout
    slot, init = (int(word) for word in session.stdout.readline().split())
    folder = orphans.place(slot)
    assert Path(f"/proc/{init}").exists() and Path(f"/sys/class/net/ft-bridge{slot}").exists()
    other, _ = orphans.take_slot()
    assert other != slot and folder.exists(), "it is not touched as long as it lives"
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{init}/ns/pid").exists():
        assert time.monotonic() < deadline, "the machine outlives its session"
        time.sleep(0.05)
    assert len(orphans.ours(folder)) == 2, "the server, as it were, and a process that has written over its environment"
    assert Path(f"/sys/class/net/ft-bridge{slot}").exists() and folder.exists()
    orphans.sky_ssh(slot).mkdir(exist_ok=True)
    bystander = subprocess.Popen(["sleep", "100"], env={"HOME": str(folder) + "-not", "PATH": "/bin:/usr/bin"})
    again, _ = orphans.take_slot()
    assert again == slot or not folder.exists(), "also where another place would do"
    assert not orphans.ours(folder) and not Path(f"/sys/class/net/ft-bridge{slot}").exists()
    assert bystander.poll() is None and not orphans.sky_ssh(slot).exists()
    bystander.kill()
    bystander.wait()
    orphans.clean(again)
    orphans.clean(other)
    assert not Path(tempfile.gettempdir(), f"ft-cloud-{again}").exists()


def test_a_tree_goes_and_nothing_that_it_points_at(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    for number in range(40):
        (tree / str(number)).mkdir(parents=True)
        (tree / str(number) / "file").write_bytes(b"x" * 5000)
    (tree / "to a folder").symlink_to(outside)
    (tree / "to a file").symlink_to(outside / "file")
    orphans.remove_tree(tree)
    assert not tree.exists() and (outside / "file").exists()
    orphans.remove_tree(tree)


def test_the_folder_that_the_processes_of_a_session_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is removed at the session's end or, if that was killed, when the next one begins, with any process that installs
    there."""
    monkeypatch.setattr(orphans, "place", lambda slot: tmp_path / f"ft-cloud-{slot}")
    orphans.main("begin", os.getpid())
    kept = orphans.shared(os.getpid())
    killed = subprocess.Popen(["sleep", "100"])
    orphans.main("begin", killed.pid)
    gone = orphans.shared(killed.pid)
    (gone / "image").mkdir()
    installing = subprocess.Popen(["sh", "-c", "sleep 100", "--target", f"{gone}/image/packages"])
    orphans.main("begin", os.getpid())
    assert gone.exists() and kept.exists() and installing.poll() is None, (
        "it is not touched as long as its process lives"
    )
    killed.kill()
    time.sleep(0.1)  # dead, but not yet waited for
    orphans.main("begin", os.getpid())
    assert not gone.exists() and kept.exists()
    assert installing.wait(timeout=10) == -signal.SIGKILL
    killed.wait()
    orphans.main("end", os.getpid())
    assert not list(tmp_path.glob(f"{orphans.SHARED}*"))


def test_sessions_that_begin_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They find the same orphans; each removes some, and none removes what another has made in their place."""

    def clean(slot: int) -> None:
        time.sleep(0.05)
        shutil.rmtree(orphans.place(slot), ignore_errors=True)

    monkeypatch.setattr(orphans, "place", lambda slot: tmp_path / f"ft-cloud-{slot}")
    monkeypatch.setattr(orphans, "clean", clean)
    for slot in range(orphans.SLOTS):
        orphans.place(slot).mkdir()
        (orphans.place(slot) / orphans.OWNER).write_text("1 0")  # process 1 started at another time
    with ThreadPoolExecutor(orphans.SLOTS) as sessions:
        taken = list(sessions.map(lambda _: orphans.take_slot(), range(orphans.SLOTS)))
    assert sorted(slot for slot, _ in taken) == list(range(orphans.SLOTS))
    assert all((folder / orphans.OWNER).exists() for _, folder in taken)
