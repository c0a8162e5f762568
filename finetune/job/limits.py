"""The time limit of a job, and how its program is stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from finetune.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from finetune.job.programs import say, shell_code
from finetune.job.settings import JobSettings
from finetune.machine.price import Ceilings, machine_price, wall_hours
from finetune.runtime.confined import remove_file

POLL_SECONDS = 0.2
ROOM_SCRIPT = Path("on_machine") / "room.sh"
"""Relative to the working directory, which is the repository."""


@dataclass(frozen=True)
class Ended:
    """code: exit code as in a shell. out_of_time: whether the program was stopped at its time limit. signalled: whether this
    process was asked to end meanwhile. over: why the program was stopped at another limit; "" if it was not."""

    code: int
    out_of_time: bool
    signalled: bool = False
    over: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether the program was ended from outside, as by a preemption, so that it should be run again."""
        by_signal = self.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        return not (self.out_of_time or self.over) and (by_signal or (self.signalled and self.code != EXIT_OK))


class Limit(Protocol):
    """A limit besides the hours. Another thread may reach it."""

    @property
    def over(self) -> str:
        """Why the program has to end; "" if it need not."""

    @property
    def overdue(self) -> bool:
        """Whether it has to end now, without more time to save."""


def hours_left(settings: JobSettings, *, of_machine: bool = False) -> float:
    """Hours from now that MAX_RUN_USD and MAX_HOURS leave to this machine. of_machine: MAX_RUN_USD is for the machine, not for a
    run of it. Raises UserError if there are none."""
    most = float(settings.max_hours)
    try:
        ceilings = Ceilings(run_usd=float(settings.max_run_usd), hours=most)
        left = wall_hours(machine_price(), ceilings, of_machine=of_machine)
    except UserError as error:
        say(str(error))
        say(f"the price of this machine is unknown: only MAX_HOURS={settings.max_hours} limits its time")
        left = most
    hours = round(most if left is None else left, 4)
    if not hours:
        raise UserError(
            f"MAX_RUN_USD={settings.max_run_usd} is used up by the hours that this machine has run"
            f"{'' if of_machine else ' and no run has been billed for'}; raise it with --env",
            code="budget.exhausted",
        )
    return hours


def run_limited(
    command: Sequence[str],
    hours: float,
    settings: JobSettings,
    output: IO[bytes] | None = None,
    limit: Limit | None = None,
) -> Ended:
    """Run the program that does the job's work; output: a file for what it prints, None for our own output.

    When its time is up or the other limit is reached, when the disk is nearly full (on_machine/room.sh), and when this process
    gets SIGTERM or SIGINT, the program gets SIGTERM and has GRACE_SECONDS to save its work. It gets one signal only, because a
    second one makes it exit at once; its child processes get none, because it still needs them.
    """
    _clear_rooms(settings.state)
    stopper = _ProgramStopper(float(settings.grace_seconds))
    ends, out_of_time, over = time.monotonic() + hours * 3600, False, ""
    with stopper.on_signals():
        program = subprocess.Popen(command, env=settings.environment, stdout=output, stderr=output)
        stopper.attach(program)
        room, full = (settings.state / f"room.{program.pid}{end}" for end in ("", ".full"))
        _watch_room(program.pid, room)
        while (code := _ended(program)) is None:
            if not stopper.requested and full.exists():
                stopper.was_signalled()
            if limit and limit.over and not stopper.requested:
                over = limit.over
                stopper.request()
            if not stopper.requested and time.monotonic() >= ends:
                out_of_time = True
                stopper.request()
            stopper.kill_if_overdue(at_once=limit is not None and limit.overdue)
    code = shell_code(code)
    if (code or out_of_time) and full.exists():
        say(
            f"the disk was nearly full ({full.read_text(encoding='utf-8').strip()} MiB left): stopped, what was saved is kept; "
            "launch again with a larger resources.disk_size, or free some space, with the same --env RUN_NAME"
        )
        remove_file(full, inside=settings.state)
        return Ended(EXIT_USER_ERROR, False)  # the disk of another machine would fill too
    return Ended(code, out_of_time, stopper.by_signal, over)


class _ProgramStopper:
    """Stops a program: sends SIGTERM once, however often that is requested, and SIGKILL when the grace period is over."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._program: subprocess.Popen[bytes] | None = None
        self._deadline: float | None = None
        self._signalled = False
        self.by_signal = False

    @property
    def requested(self) -> bool:
        return self._deadline is not None

    def request(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace
        self._terminate()

    def was_signalled(self) -> None:
        """Another process has sent it SIGTERM; the grace period starts all the same."""
        self._deadline, self._signalled = time.monotonic() + self._grace, True

    def attach(self, program: subprocess.Popen[bytes]) -> None:
        self._program = program
        if self.requested:  # by a signal that arrived while it was starting
            self._terminate()

    def kill_if_overdue(self, *, at_once: bool) -> None:
        if self._program and (at_once or (self._deadline is not None and time.monotonic() >= self._deadline)):
            self._program.kill()

    def _on_signal(self, *_: object) -> None:
        self.by_signal = True
        self.request()

    def _terminate(self) -> None:
        if self._program and not self._signalled:
            self._signalled = True
            self._program.terminate()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """While the block runs, SIGTERM and SIGINT do not end this process, but request the end of the program."""
        earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


def _ended(program: subprocess.Popen[bytes]) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return program.wait(POLL_SECONDS)
    return None


def _clear_rooms(state: Path) -> None:
    """Removes what the disk watchers of programs that have ended left behind, as a machine does that was switched off."""
    for file in state.glob("room.*"):
        process = file.name.split(".")[1]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            remove_file(file, inside=state)


def _watch_room(process: int, file: Path) -> None:
    """Starts the disk watcher detached (--fork), so that it keeps running if SkyPilot kills this process and its children."""
    words = ["setsid", "--fork", "bash", str(ROOM_SCRIPT), str(process), str(file)]
    nothing = subprocess.DEVNULL
    with suppress(OSError):
        subprocess.run(words, stdin=nothing, stdout=nothing, stderr=nothing, check=False)
