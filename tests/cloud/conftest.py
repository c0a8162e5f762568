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
from machine_project import checkout  # noqa: E402
from possible import REQUIRED, missing  # noqa: E402
from training import add_training  # noqa: E402
from whole import Whole, launch_whole  # noqa: E402
from world import World, emulated_world  # noqa: E402

LONGEST = (
    "budget_that_runs_out",
    "stopping_and_starting",
    "test_a_cut_line",
    "run_that_hangs",
    "nearly_full",
    "refused_machines",
    "full_at_once",
    "out_of_stock",
)
"""Ends of the names of the tests that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that processes which share them are done at about the same time. Tests of other folders stay."""

    def place(item: pytest.Item) -> int:
        named = [place for place, end in enumerate(LONGEST) if item.name.endswith(end)]
        return named[0] if named and item.get_closest_marker("cloud") else len(LONGEST)

    items.sort(key=place)


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
    whole_world.empty()
    yield whole_world
    try:
        whole_world.cloud.assert_empty()
    finally:
        if whole_world.cloud.machines():  # SkyPilot is to forget them too, or the next test meets them
            whole_world.all_well()
            whole_world.sky.run("down", "--all", "--yes", "--purge")
        whole_world.empty()


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the project with the tiny training in it."""
    folder = checkout(tmp_path_factory.mktemp("checkout") / "project")
    add_training(folder)
    return folder


@pytest.fixture(scope="session")
def whole(whole_world: World, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    whole_world.empty()  # this fixture may come in the middle of a session
    return launch_whole(whole_world, project, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def bare_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer of an image with a user and sshd's settings, without SkyPilot's runtime."""
    skip_unless_possible()
    folder = tmp_path_factory.mktemp("image") / "layer"
    machine_image.lay_out(folder / "upper")
    with machine_image.running(folder) as booted:
        machine_image.make_user(booted)
    return folder / "upper"
