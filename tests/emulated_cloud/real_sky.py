"""The user's own SkyPilot, restricted to clusters and jobs whose names begin with this session's prefix."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.emulated_cloud.real_gcloud import Gcloud, RealMachine
from tests.emulated_cloud.skypilot import Done

PREFIX = re.compile("ftreal-[0-9a-f]{4}-")
LONGEST = 20
"""Characters of a name: with the number of a job and SkyPilot's hash of the user it stays below 35, above which SkyPilot replaces
it with a hash."""
KINDS = ("cluster", "job")
ENDING = ("down", "stop", "start", "cancel", "autostop")
"""Commands that change what runs."""
GONE_SECONDS, COMMAND_SECONDS = 240.0, 600.0
PAUSE_SECONDS, SILENT_SECONDS = 5.0, 60.0
"""Between two calls of gcloud, and for how long at least they are retried if Google does not answer."""
FAULTS = (AssertionError, subprocess.TimeoutExpired)
"""Raised when gcloud fails or takes too long."""
PROGRAMS = "FT_REAL_PROGRAMS"
"""For tests of this module: a folder of programs, first on PATH."""


class RealSky:
    """home: the user's. launched: a file with a line "cluster NAME" or "job NAME" for each launch, written before it.

    env: for its commands, if not that of this process (in tests of this module).
    """

    def __init__(
        self, prefix: str, launched: Path, home: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        assert PREFIX.fullmatch(prefix), f"{prefix}: not a session's prefix"
        self.prefix, self.launched, self.home = prefix, launched, home or Path.home()
        self.settled: set[str] = set()
        first = [os.environ[PROGRAMS]] if PROGRAMS in os.environ else []
        path = os.pathsep.join([*first, sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        self.env = dict(os.environ) | {"PATH": path} if env is None else env

    def run(self, *words: str, cwd: Path | None = None, typed: str = "", timeout: float = 3600, **env: str) -> Done:
        """`sky WORDS`. Raises AssertionError, and runs nothing, if that could affect anything that is not this session's."""
        self._check(words)
        return self.program("sky", *words, cwd=cwd, typed=typed, timeout=timeout, **env)

    def program(self, *words: str, cwd: Path | None = None, typed: str = "", timeout: float = 3600, **env: str) -> Done:
        """Raises AssertionError with its output if it takes longer than `timeout` seconds."""
        began, command = time.monotonic(), " ".join(words)
        try:
            done = subprocess.run(
                words, env=self.env | env, cwd=cwd or self.home, input=typed, timeout=timeout, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            out = error.stdout or b""
            text = out.decode(errors="replace") if isinstance(out, bytes) else out
            raise AssertionError(f"{command}: not done in {timeout:.0f} s\n{text[-6000:]}") from None
        return Done(command, done.returncode, done.stdout, time.monotonic() - began)

    @contextmanager
    def ssh(self, cluster: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`ssh OPTIONS CLUSTER` while the block runs."""
        assert cluster.startswith(self.prefix), f"{cluster}: not of this session"
        process = subprocess.Popen(["ssh", *options, cluster], env=self.env, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)

    def names(self) -> dict[str, list[str]]:
        """Clusters and jobs that this session has launched and this process has not taken down yet."""
        lines = self.launched.read_text(encoding="utf-8").splitlines() if self.launched.exists() else []
        found = [line.split(" ") for line in dict.fromkeys(lines) if line.count(" ") == 1]
        return {kind: [name for one, name in found if one == kind and name not in self.settled] for kind in KINDS}

    def _check(self, words: Sequence[str]) -> None:
        managed = words[:1] == ("jobs",)
        verb, rest = words[managed], words[managed + 1 :]
        if verb == "launch" and "--dryrun" not in rest:
            name = _value(rest, ("-n", "--name") if managed else ("-c", "--cluster"))
            assert name.startswith(self.prefix), (
                f"sky {' '.join(words)}: it has no name that begins with {self.prefix}, so it is not run"
            )
            assert len(name) <= LONGEST, f"{name}: at most {LONGEST} characters"
            with self.launched.open("a", encoding="utf-8") as file:
                file.write(f"{'job' if managed else 'cluster'} {name}\n")
        elif verb in ENDING:
            names = [word for word in rest if not word.startswith("-")]
            ours = bool(names) and all(name.startswith(self.prefix) for name in names)
            assert ours and not {"-a", "--all", "-A", "--all-users"} & {*rest}, (
                f"sky {' '.join(words)}: not this session's"
            )


def _value(words: Sequence[str], options: tuple[str, ...]) -> str:
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word in options), "")


def take_down(sky: RealSky, gcloud: Gcloud, seconds: float = GONE_SECONDS) -> list[str]:
    """Takes down what this session has launched, and nothing else. Returns lines to print; the last says what is left, if
    anything.

    First as a user would, with SkyPilot; what still exists after `seconds` is deleted machine by machine.
    """
    report: list[str] = []
    names = sky.names()
    for name in names["job"]:
        report.append(_attempt(sky, "jobs", "cancel", "-y", "-n", name))
    for name in names["cluster"]:
        report.append(_attempt(sky, "down", "-y", name))
    try:
        left = _delete_machines(gcloud, sky.prefix, seconds if any(names.values()) else 0, report)
    except FAULTS as error:
        look = f"gcloud compute instances list --filter=name~^{sky.prefix}"
        return [*report, f"LEFT, PERHAPS, AND COSTING MONEY: {str(error).splitlines()[0]}; look with `{look}`"]
    if left:
        return [*report, f"LEFT, AND COSTING MONEY: {', '.join(left)}"]
    sky.settled |= {name for kind in KINDS for name in names[kind]}
    return [*report, f"no machine and no disk of {sky.prefix}... is left"]


def _delete_machines(gcloud: Gcloud, prefix: str, seconds: float, report: list[str]) -> list[str]:
    """Deletes the machines that still exist after `seconds`. Returns machines and disks that are left even then; raises one of
    FAULTS if Google does not answer."""
    left = _wait_until_gone(gcloud, prefix, seconds)
    for machine in left:
        report.append(f"gcloud compute instances delete {machine.name}: it still existed after `sky down`")
        try:
            gcloud.delete(machine)
        except FAULTS as error:
            report.append(str(error))
    if left:
        left = _wait_until_gone(gcloud, prefix, 60)
    return [*(machine.name for machine in left), *gcloud.disks(prefix)]


def _attempt(sky: RealSky, *words: str) -> str:
    """Runs a command and returns one line on the outcome; a failure does not stop the ones after it."""
    try:
        done = sky.run(*words, timeout=COMMAND_SECONDS)
    except AssertionError as error:
        return str(error).splitlines()[0]
    last = next((line for line in reversed(done.out.splitlines()) if line.strip()), "no word")
    return done.command if done.code == 0 else f"{done.command}: exit code {done.code}: {last.strip()}"


def _wait_until_gone(gcloud: Gcloud, prefix: str, seconds: float) -> list[RealMachine]:
    began = time.monotonic()
    while True:
        try:
            left = gcloud.machines(prefix)
            if not left or time.monotonic() - began > seconds:
                return left
        except FAULTS:
            if time.monotonic() - began > max(seconds, SILENT_SECONDS):
                raise
        time.sleep(PAUSE_SECONDS)
