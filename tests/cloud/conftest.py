"""Fixtures of the tests of the cloud path: one emulated Google Cloud and one SkyPilot for all of them, emptied after each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE):  # tests/ for its fixtures, and our own modules
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import machine_image  # noqa: E402
from machine_process import Booted  # noqa: E402
from machine_project import checkout  # noqa: E402
from possible import REQUIRED, missing  # noqa: E402
from training import add_training  # noqa: E402
from whole import Whole, launch_whole  # noqa: E402
from world import World, emulated_world  # noqa: E402


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
    whole_world.cloud.calls.clear()
    site = whole_world.site
    site.write_back = site.upload_bytes_per_second = site.disk_bytes = 0
    whole_world.buckets.allow()
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
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the project with the tiny training in it."""
    folder = checkout(tmp_path_factory.mktemp("checkout") / "project")
    add_training(folder)
    return folder


@pytest.fixture(scope="session")
def whole(whole_world: World, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return launch_whole(whole_world, project, tmp_path_factory.mktemp("whole"))


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
