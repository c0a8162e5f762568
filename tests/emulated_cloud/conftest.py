"""Fixtures of the tests of the cloud path: one emulated Google Cloud and one SkyPilot for all of them, emptied after each."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.emulated_cloud import machine_image
from tests.emulated_cloud.environment import CloudEnvironment, emulated_environment
from tests.emulated_cloud.machine_project import checkout
from tests.emulated_cloud.pace import PACE, wait_until
from tests.emulated_cloud.possible import REQUIRED, missing
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import add_training
from tests.emulated_cloud.whole import Whole, launch_whole

LONGEST = (
    "budget_that_runs_out",
    "stopping_and_starting",
    "while_it_is_scored",
    "run_is_served",
    "test_a_cut_line",
    "run_that_hangs",
    "a_warm_bucket",
    "budget_that_ends",
    "nearly_full",
    "refused_machines",
    "full_at_once",
    "out_of_stock",
)
"""Ends of the names of the tests that take minutes, the longest first."""
FIRST_OF_REST = "out_of_stock"
"""Of the short suite's tests: by its start the one with the budget knows what a start takes here."""

SHORT, GROUP = "cloud_short", "xdist_group"
"""Markers: of tests in the short suite, and of those that one process is to run."""
FAILED = pytest.StashKey[bool]()
FORGET_SECONDS = 90
"""For which a job that is cancelled is waited for."""
ALIVE = ("PENDING", "STARTING", "RUNNING", "RECOVERING", "CANCELLING")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that processes which share them are done at about the same time. Tests of other folders stay.

    Of the short suite one process has the tests with the group "whole" and the other has the rest: pytest-xdist hands out some
    ahead, and with so few one process would get too many.
    """

    def place(item: pytest.Item) -> int:
        named = [place for place, end in enumerate(LONGEST) if item.name.endswith(end)]
        return named[0] if named and item.get_closest_marker("cloud") else len(LONGEST)

    items.sort(key=place)
    if config.option.markexpr == SHORT:
        items.sort(key=lambda item: not item.name.endswith(FIRST_OF_REST))
    for item in items:
        if config.option.markexpr == SHORT and item.get_closest_marker(SHORT) and not item.get_closest_marker(GROUP):
            item.add_marker(pytest.mark.xdist_group("rest"))


@pytest.fixture(scope="session")
def whole_environment() -> Iterator[CloudEnvironment]:
    skip_unless_possible()
    with emulated_environment() as environment:
        record_metric(f"pace {PACE.factor:.1f}; seconds of the preparation: {environment.seconds}")
        yield environment


def skip_unless_possible() -> None:
    reason = missing()
    if reason and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"the emulated cloud: {reason}")
    if reason:
        pytest.skip(f"the emulated cloud: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture
def environment(whole_environment: CloudEnvironment, request: pytest.FixtureRequest) -> Iterator[CloudEnvironment]:
    """With nothing in it. After the test nothing may be left of what it launched, and nothing may have gone wrong in the
    emulation itself: that is asserted, then everything is wiped."""
    whole_environment.empty()
    yield whole_environment
    try:
        whole_environment.cloud.assert_empty()
        assert not whole_environment.cloud.defects, f"of the emulated cloud itself: {whole_environment.cloud.defects}"
    finally:
        if whole_environment.cloud.machines() or request.node.stash.get(FAILED, False):
            forget(whole_environment)
        whole_environment.empty()


def forget(environment: CloudEnvironment) -> None:
    """SkyPilot has to forget what is left too, or the next test is affected by it: a managed job gets a new machine for a wiped
    one."""
    environment.all_well()
    environment.sky.run("jobs", "cancel", "--all", "--yes")

    def come() -> bool:
        return not any(word in environment.sky.run("jobs", "queue", "--skip-finished").out for word in ALIVE)

    with suppress(AssertionError):
        wait_until(come, FORGET_SECONDS, lambda waited: f"a job is there after {waited:.0f} s", every=3)
    environment.sky.run("down", "--all", "--yes", "--purge")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the project with the tiny training in it."""
    folder = checkout(tmp_path_factory.mktemp("checkout") / "project")
    add_training(folder)
    return folder


@pytest.fixture(scope="session")
def whole(whole_environment: CloudEnvironment, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    whole_environment.empty()  # this fixture may come in the middle of a session
    return launch_whole(whole_environment, project, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def bare_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer of an image with a user and sshd's settings, without SkyPilot's runtime."""
    skip_unless_possible()
    PACE.learn()
    folder = tmp_path_factory.mktemp("image") / "layer"
    machine_image.lay_out(folder / "upper")
    with machine_image.running(folder) as booted:
        machine_image.make_user(booted)
    return folder / "upper"
