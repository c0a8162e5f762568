"""A session that is killed leaves things behind; the next one removes them, and only them."""

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

from tests.emulated_cloud import leftovers

HERE = Path(__file__).resolve().parent

KILLED = """\
import sys, time
sys.path[:0] = [{root!r}]
import subprocess
from pathlib import Path
from tests.emulated_cloud.gce import Cloud
from tests.emulated_cloud.leftovers import take_slot
from tests.emulated_cloud.machine import Machine, Site, open_site
slot, folder = take_slot()
layer = Path({layer!r})
site = Site(slot, folder / "machines", layer, "", "")
open_site(site)
cloud = Cloud((site.google, 8080), "p", ["us-central1-a"], site.machine_addresses(), lambda one: Machine(site, one))
from tests.emulated_cloud.gce_instances import parse_wish
wish = parse_wish("us-central1-a", {{"machineType": "n1-standard-8"}})
cloud.instances.power_on(cloud.instances.create("one-compute", wish, {{}}))
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
    folder = leftovers.place(slot)
    assert Path(f"/proc/{init}").exists() and Path(f"/sys/class/net/ft-bridge{slot}").exists()
    other, _ = leftovers.take_slot()
    assert other != slot and folder.exists(), "it is not touched as long as it lives"
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{init}/ns/pid").exists():
        assert time.monotonic() < deadline, "the machine outlives its session"
        time.sleep(0.05)
    assert len(leftovers.ours(folder)) == 2, (
        "the server, as it were, and a process that has written over its environment"
    )
    assert Path(f"/sys/class/net/ft-bridge{slot}").exists() and folder.exists()
    leftovers.sky_ssh(slot).mkdir(exist_ok=True)
    bystander = subprocess.Popen(["sleep", "100"], env={"HOME": str(folder) + "-not", "PATH": "/bin:/usr/bin"})
    again, _ = leftovers.take_slot()
    assert again == slot or not folder.exists(), "also where another place would do"
    assert not leftovers.ours(folder) and not Path(f"/sys/class/net/ft-bridge{slot}").exists()
    assert bystander.poll() is None and not leftovers.sky_ssh(slot).exists()
    bystander.kill()
    bystander.wait()
    leftovers.clean(again)
    leftovers.clean(other)
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
    leftovers.remove_tree(tree)
    assert not tree.exists() and (outside / "file").exists()
    leftovers.remove_tree(tree)


def test_the_folder_that_the_processes_of_a_session_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes at the session's end, or if that was killed when the next begins; and with it what installs something there."""
    monkeypatch.setattr(leftovers, "place", lambda slot: tmp_path / f"ft-cloud-{slot}")
    leftovers.main("begin", os.getpid())
    kept = leftovers.shared(os.getpid())
    killed = subprocess.Popen(["sleep", "100"])
    leftovers.main("begin", killed.pid)
    gone = leftovers.shared(killed.pid)
    (gone / "image").mkdir()
    installing = subprocess.Popen(["sh", "-c", "sleep 100", "--target", f"{gone}/image/packages"])
    leftovers.main("begin", os.getpid())
    assert gone.exists() and kept.exists() and installing.poll() is None, (
        "it is not touched as long as its process lives"
    )
    killed.kill()
    time.sleep(0.1)  # dead, though nobody has asked about it
    leftovers.main("begin", os.getpid())
    assert not gone.exists() and kept.exists()
    assert installing.wait(timeout=10) == -signal.SIGKILL
    killed.wait()
    leftovers.main("end", os.getpid())
    assert not list(tmp_path.glob(f"{leftovers.SHARED}*"))


def test_sessions_that_begin_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They find the same leftovers; each removes some and none takes away what another has made in their place."""

    def clean(slot: int) -> None:
        time.sleep(0.05)
        shutil.rmtree(leftovers.place(slot), ignore_errors=True)

    monkeypatch.setattr(leftovers, "place", lambda slot: tmp_path / f"ft-cloud-{slot}")
    monkeypatch.setattr(leftovers, "clean", clean)
    for slot in range(leftovers.SLOTS):
        leftovers.place(slot).mkdir()
        (leftovers.place(slot) / leftovers.OWNER).write_text("1 0")  # process 1 began at another time
    with ThreadPoolExecutor(leftovers.SLOTS) as sessions:
        taken = list(sessions.map(lambda _: leftovers.take_slot(), range(leftovers.SLOTS)))
    assert sorted(slot for slot, _ in taken) == list(range(leftovers.SLOTS))
    assert all((folder / leftovers.OWNER).exists() for _, folder in taken)
