"""How fast this computer is, and for how long the scenarios therefore wait: the one place that knows both.

Bounds of waits are written in seconds of the computer that the scenarios were measured on last. Before anything else is started,
`python -m tests.emulated_cloud.pace` measures what most of a scenario consists of: SkyPilot's processes starting, as many side
by side as there are test environments. It prints the factor, which the processes of the environments find in FT_CLOUD_PACE. A
computer on which that takes longer waits longer, by the same factor; none waits less.

How long a machine takes from its boot to its training decides what a budget pays for, so the starts that were seen in this
session count there, and the factor alone before the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

VARIABLE = "FT_CLOUD_PACE"
LOADING = "import sky.client.cli.command"
ENVIRONMENTS = 2
"""Side by side, as dev/cloud_test.sh has it."""
IMPORT_SECONDS = 2.4
"""Until that many processes have SkyPilot's command line loaded; measured on two quiet cores of an AMD EPYC, 2026-11-29."""
MOST = 5.0
"""No factor is above it: a budget that pays for more lasts too long, and a scenario that fails is to end."""
START_SECONDS = 65
"""From a machine's boot to its training, on that computer, while the other environment is at work."""
START_MARGIN = 1.75
"""A start may take so much longer than those before: 82 s after one of 52 s, once another program had begun beside (measured)."""


class Pace:
    """factor: how many times as long as there things take here, from 1 to MOST. starts: seconds of those that were seen."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.starts: list[float] = []

    def learn(self) -> None:
        """The factor, from the environment; it is measured where it is not there, as without dev/cloud_test.sh."""
        told = os.environ.get(VARIABLE)
        self.factor = float(told) if told else measure()

    def start_seconds(self) -> float:
        """What a start takes here at most."""
        return START_MARGIN * (max(self.starts) if self.starts else self.factor * START_SECONDS)


PACE = Pace()
"""Of this process."""


def measure(load: Callable[[], float] | None = None) -> float:
    """The factor of this computer. Of two looks the shorter counts: what another program takes for a moment is not the pace.

    load: returns the seconds of one look; the first one reads the files from the disk and does not count.
    """
    load = load or load_side_by_side
    load()
    return min(max(1.0, min(load() for _ in range(2)) / IMPORT_SECONDS), MOST)


def load_side_by_side() -> float:
    """Seconds until as many processes as there are test environments have loaded SkyPilot's command line. Raises AssertionError
    where one cannot."""
    with tempfile.TemporaryDirectory() as home:  # it makes a folder there
        began = time.monotonic()
        words = [sys.executable, "-c", LOADING]
        quiet = subprocess.DEVNULL  # the factor alone is printed
        processes = [
            subprocess.Popen(words, cwd=home, env=os.environ | {"HOME": home}, stdout=quiet)
            for _ in range(ENVIRONMENTS)
        ]
        codes = [process.wait() for process in processes]
        seconds = time.monotonic() - began
    assert not any(codes), f"{words}: exit codes {codes}"
    return seconds


def patience(seconds: float) -> float:
    """What so many seconds of that computer are on this one."""
    return seconds * PACE.factor


def paid_seconds(starts: int, training: float) -> float:
    """Of a machine, for a budget: so many starts, and `training` seconds of that computer."""
    return starts * PACE.start_seconds() + patience(training)


def wait_until(
    come: Callable[[], bool], seconds: float, failure: Callable[[float], str], *, every: float = 0.5
) -> None:
    """Asks `come` until it says so. Raises AssertionError with what `failure` says, told how many seconds were waited, when
    `seconds` of that computer are over."""
    allowed = patience(seconds)
    deadline = time.monotonic() + allowed
    while not come():
        assert time.monotonic() < deadline, failure(allowed)
        time.sleep(every)


if __name__ == "__main__":
    print(f"{measure():.2f}")
