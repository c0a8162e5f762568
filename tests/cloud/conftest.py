"""Fixtures of the tests of the cloud path: one emulated Google Cloud and one SkyPilot for all of them, emptied after each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE):  # tests/ for its fixtures, and our own modules
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import machine_image  # noqa: E402
from catalog_fixture import shared_catalog  # noqa: E402
from machine_process import Booted  # noqa: E402
from machine_project import checkout, prepare_project  # noqa: E402
from training import add_training  # noqa: E402
from world import World, emulated_world  # noqa: E402

PROGRAMS = {
    "sshd": "openssh-server",
    "rsync": "rsync",
    "ip": "iproute2",
    "fusermount3": "fuse3",
    "sudo": "sudo",
    "curl": "curl",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh-keygen": "openssh-client",
}
"""Program -> Debian package."""
REQUIRED = "FT_CLOUD_REQUIRED"
"""Set to 1, where these tests are to run: what would skip them fails them then."""


def missing() -> str:
    """Why the emulated cloud cannot be had here; "" if it can."""
    if os.geteuid() != 0:
        return "it needs root (network namespaces, mounts)"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    lacking = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if lacking:
        return f"Debian packages are missing: apt-get install {' '.join(lacking)}"
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is missing"
    tried = subprocess.run(
        [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--propagation",
            "private",
            "mount",
            "-t",
            "tmpfs",
            "x",
            "/mnt",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"namespaces are not allowed: {tried.stderr.strip()}"
    if subprocess.run([sys.executable, "-c", "import sky"], cwd="/", capture_output=True, check=False).returncode:
        return "SkyPilot is not installed (extra `cloud`)"
    if shared_catalog() is None:
        return "the price catalog ../shared/data/skypilot_catalog is missing"
    return ""


@pytest.fixture(scope="session")
def whole_world() -> Iterator[World]:
    skip_unless_possible()
    with emulated_world() as world:
        yield world


def skip_unless_possible() -> None:
    reason = missing()
    if reason and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"the emulated cloud: {reason}")
    if reason:
        pytest.skip(f"the emulated cloud: {reason}")


@pytest.fixture
def world(whole_world: World) -> Iterator[World]:
    """With nothing in it. After the test nothing may be left of what it launched: that is asserted, then everything is wiped."""
    whole_world.cloud.wipe()
    whole_world.cloud.bill.stretches.clear()
    whole_world.site.write_back = whole_world.site.upload_bytes_per_second = 0
    yield whole_world
    try:
        whole_world.cloud.assert_empty()
    finally:
        if whole_world.cloud.machines():  # SkyPilot is to forget them too, or the next test meets them
            whole_world.cloud.faults.clear()
            whole_world.sky.expire_login(False)
            whole_world.sky.run("down", "--all", "--yes", "--purge")
        whole_world.cloud.wipe()


@pytest.fixture(scope="session")
def project(whole_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the project with the tiny training in it, and an image in which its set-up for GPU tasks has run."""
    prepare_project(whole_world.site.layer.parents[1], setup=())
    folder = checkout(tmp_path_factory.mktemp("checkout") / "project")
    add_training(folder)
    return folder


@pytest.fixture(scope="session")
def bare_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer of an image with a user and sshd's settings, without SkyPilot's runtime."""
    skip_unless_possible()
    folder = tmp_path_factory.mktemp("image") / "layer"
    machine_image.lay_out(folder / "upper")
    settings = {"name": "image", "folder": str(folder), "image": None, "network": None, "services": [], "env": {}}
    booted = Booted(settings, own_network=False)
    try:
        booted.boot()
        machine_image.make_user(booted)
    finally:
        booted.power_off()
    return folder / "upper"
