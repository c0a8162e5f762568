"""How long a job may go on, and the end of the program that does its work."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.job.programs import say, shell_code
from finetune.job.settings import JobSettings
from finetune.machine.price import Ceilings, machine_price, wall_hours

LOOK_SECONDS = 0.2
ROOM_SCRIPT = Path("on_machine") / "room.sh"
"""In the working directory, which is the repository."""


@dataclass(frozen=True)
class Ended:
    """code: as a shell has it. out_of_time: whether its hours were over before it ended."""

    code: int
    out_of_time: bool


def hours_left(settings: JobSettings) -> float:
    """Hours that MAX_RUN_USD and MAX_HOURS leave to this machine, from now. Raises UserError when there are none."""
    most = float(settings.max_hours)
    try:
        left = wall_hours(machine_price(), Ceilings(run_usd=float(settings.max_run_usd), hours=most))
    except UserError as error:
        say(str(error))
        say(f"the price of this machine is not known: MAX_HOURS={settings.max_hours} alone limits its time")
        left = most
    hours = round(most if left is None else left, 4)
    if not hours:
        raise UserError(
            f"MAX_RUN_USD={settings.max_run_usd} is used up by the hours that this machine has run; raise it with --env",
            code="budget.exhausted",
        )
    return hours


def run_limited(command: Sequence[str], hours: float, settings: JobSettings, output: IO[bytes] | None = None) -> Ended:
    """Run the program that does the job's work, output: for what it prints, else where we print.

    When its time is up, when the disk is nearly full (on_machine/room.sh), and when we are told to end, it gets SIGTERM and has
    GRACE_SECONDS to save its work. It gets it once, because a second one means: at once; and it alone, because it still needs the
    processes that it has started.
    """
    full = settings.state / "room.full"
    full.unlink(missing_ok=True)
    ending = _Ending(float(settings.grace_seconds))
    ends, out_of_time = time.monotonic() + hours * 3600, False
    with ending.on_signals():
        program = subprocess.Popen(command, env=settings.environment, stdout=output, stderr=output)
        ending.of(program)
        _watch_room(program.pid, settings.state / "room")
        while (code := _ended(program)) is None:
            if not ending.asked and full.exists():
                ending.was_told()
            if not ending.asked and time.monotonic() >= ends:
                out_of_time = True
                ending.ask()
            ending.insist()
    code = shell_code(code)
    if (code or out_of_time) and full.exists():
        say(
            f"the disk was nearly full ({full.read_text(encoding='utf-8').strip()} MiB left): stopped, what was saved is kept; "
            "launch again with a larger resources.disk_size, or free some room, and the same --env RUN_NAME"
        )
        return Ended(EXIT_USER_ERROR, False)  # it would fill on another machine, too
    return Ended(code, out_of_time)


class _Ending:
    """Tells a program to end, whoever asks and however often, and kills it when it takes too long."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._program: subprocess.Popen[bytes] | None = None
        self._deadline: float | None = None
        self._told = False

    @property
    def asked(self) -> bool:
        return self._deadline is not None

    def ask(self, *_: object) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace
        self._tell()

    def was_told(self) -> None:
        """Somebody else has sent it SIGTERM; its time runs all the same."""
        self._deadline, self._told = time.monotonic() + self._grace, True

    def of(self, program: subprocess.Popen[bytes]) -> None:
        self._program = program
        if self.asked:  # by a signal that came while it started
            self._tell()

    def insist(self) -> None:
        if self._program and self._deadline is not None and time.monotonic() >= self._deadline:
            self._program.kill()

    def _tell(self) -> None:
        if self._program and not self._told:
            self._told = True
            self._program.terminate()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """While the block runs, SIGTERM and SIGINT do not end us, but ask."""
        earlier = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


def _ended(program: subprocess.Popen[bytes]) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return program.wait(LOOK_SECONDS)
    return None


def _watch_room(process: int, file: Path) -> None:
    """Its watcher outlives us where SkyPilot ends us and our children; --fork makes it nobody's child."""
    words = ["setsid", "--fork", "bash", str(ROOM_SCRIPT), str(process), str(file)]
    nothing = subprocess.DEVNULL
    with suppress(OSError):
        subprocess.run(words, stdin=nothing, stdout=nothing, stderr=nothing, check=False)
