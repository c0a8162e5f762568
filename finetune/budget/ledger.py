"""What a run has cost: one file per attempt, and the account over all of them.

attempt-NNN.jsonl is an attempt to train, evaluation-NNN.jsonl one to score what was trained. Both are part of what the run costs
and count towards its ceilings; `Account.of` tells them apart. A folder of serving-NNN.jsonl is the same for machines that serve,
and one of sweep-NNN.jsonl for what a sweep's machines cost besides its trials.
An attempt's file is small and is rewritten as a whole at each event, because a bucket cannot append. Usage is the sum over the
attempts of (last recorded metered seconds) x (price of the machine); wall-clock time plays no part in it. A price that changes
while an attempt runs counts from its line on.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.budget.attempts import METERED, PREFIXES, Account, Attempt, Line, Work, attempt_of, read_attempt
from finetune.errors import UserError
from finetune.machine.price import MachinePrice
from finetune.runtime import fault_injection
from finetune.runtime.files import atomic_file, disk_error, names_in, remove_unfinished

HEARTBEAT_RETENTION_SECONDS = 600.0
"""A heartbeat replaces the previous one, except that one per this many seconds is kept: the file of a long run stays small."""
_WORK = {prefix: work for work, prefix in PREFIXES.items()}
_NAME = re.compile(rf"({'|'.join(_WORK)})-([0-9]{{3,9}})\.jsonl")


class Ledger:
    """A run's folder of attempts. work: of new ones, which are numbered by work; an account has those of every work."""

    def __init__(self, folder: Path, work: Work = "train") -> None:
        self.folder, self.work = folder, work

    def account(self, without: str | None = None) -> Account:
        """The account from all files, except that of the token `without`. Corrupt files are reported as problems; raises
        UserError if the folder cannot be listed."""
        attempts: list[Attempt] = []
        problems: list[str] = []
        seen: dict[str, str] = {}
        for work, number, path in self._files():
            attempt = read_attempt(number, path, work)
            if without is not None and attempt.token == without:
                continue
            problems += [f"{path}: {problem}" for problem in attempt.problems]
            if attempt.token is not None and attempt.token in seen:
                problems.append(f"{path}: a copy of {seen[attempt.token]}; counted once")
                continue
            seen[attempt.token or str(path)] = path.name
            attempts.append(attempt)
        unpriced = [attempt.name for attempt in attempts if attempt.usd_per_hour is None]
        if unpriced and len(unpriced) < len(attempts):
            problems.append(f"{self.folder}: no price for {', '.join(unpriced)}; not in the dollars")
        return Account(tuple(attempts), tuple(problems))

    def next_attempt(self) -> int:
        """One more than the highest number in the folder, readable or not. Raises UserError like `account`."""
        return max((number for work, number, _ in self._files() if work == self.work), default=0) + 1

    def new_attempt(
        self, number: int, *, machine: dict[str, Any], price: MachinePrice | None, resumed_step: int | None
    ) -> AttemptLog:
        """A new attempt. `AttemptLog.begin` writes its file, under the next free number if this one is taken by then.

        machine: facts for the reader, such as zone, gpu, spot. price: of the machine.
        """
        usd_per_hour, basis = (price.usd_per_hour, price.basis) if price else (None, None)
        begin = {"event": "begin", "at": None, "attempt": number, "token": secrets.token_hex(8), METERED: None}
        facts = {"step": resumed_step, "usd_per_hour": usd_per_hour, "basis": basis, "machine": machine}
        return AttemptLog(self, begin | facts)

    def path(self, number: int) -> Path:
        return self.folder / f"{PREFIXES[self.work]}-{number:03d}.jsonl"

    def _files(self) -> list[tuple[Work, int, Path]]:
        """By work in the order of PREFIXES, which is that of a run, and by number."""
        found = [
            (_WORK[m[1]], int(m[2]), self.folder / m[0])
            for name in names_in(self.folder)
            if (m := _NAME.fullmatch(name))
        ]
        return sorted(found, key=lambda file: (list(PREFIXES).index(file[0]), *file[1:]))


class AttemptLog:
    """The file of the running attempt, from `begin` on. Any thread may write; each call raises UserError if the file cannot be
    written, and the next call that succeeds also writes what is missing."""

    def __init__(self, ledger: Ledger, begin: Line) -> None:
        self._ledger, self._lines = ledger, [begin]
        self._lock = threading.Lock()
        self._written = False

    def begin(self, seconds_before: float) -> None:
        """Creates the file. seconds_before: seconds already on the meter."""
        folder = self._ledger.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        remove_unfinished(folder, f"{PREFIXES[self._ledger.work]}-*.jsonl")
        with self._lock:
            self._lines[0].update({"at": _now(), METERED: round(seconds_before, 3)})
            self._write()

    @property
    def number(self) -> int:
        return int(self._lines[0]["attempt"])

    @property
    def path(self) -> Path:
        return self._ledger.path(self.number)

    def others(self) -> Account:
        """All other attempts as their files are now. Raises UserError like `Ledger.account`."""
        return self._ledger.account(without=str(self._lines[0]["token"]))

    def attempt(self) -> Attempt:
        """The attempt as its file has it, or would have it if it could be written."""
        with self._lock:
            return attempt_of(self.number, self.path.name, self._lines, (), self._ledger.work)

    def heartbeat(self, seconds: float, step: int | None) -> None:
        """Records that the attempt is alive. seconds: on its meter. step: optimizer steps done."""
        line = {"event": "heartbeat", "at": _now(), METERED: round(seconds, 3), "step": step}
        with self._lock:
            if _replaceable(self._lines[-2:]):
                self._lines.pop()
            self._lines.append(line)
            self._write()

    def note(self, event: str, **facts: Any) -> None:
        """Records an event, such as a checkpoint; a `step` among the facts counts as in a heartbeat."""
        with self._lock:
            self._lines.append({"event": event, "at": _now()} | {name: _plain(fact) for name, fact in facts.items()})
            self._write()

    def end(self, seconds: float, reason: str, step: int | None) -> None:
        self.note("end", **{METERED: round(seconds, 3), "step": step, "reason": reason})

    def _write(self) -> None:
        if self._written and not self._ledger.folder.is_dir():  # creating it again would hide that the bucket is gone
            raise UserError(
                f"{self._ledger.folder}: has vanished; is the bucket still mounted?", code="budget.ledger_vanished"
            )
        self._avoid_taken_number()
        text = "".join(json.dumps(line, allow_nan=False, default=str) + "\n" for line in self._lines)
        with atomic_file(self.path) as file:
            file.write(text[: len(text) // 2])
            fault_injection.place("ledger")
            file.write(text[len(text) // 2 :])
        self._written = True

    def _avoid_taken_number(self) -> None:
        """Never overwrite another attempt's file: continue under the next free number and record that in the file."""
        owner = read_attempt(self.number, self.path).token if self.path.exists() else None
        if owner in (None, self._lines[0]["token"]) and (self._written or not self.path.exists()):
            return
        taken, free = self.number, self._ledger.next_attempt()
        self._lines[0]["attempt"] = free
        self._lines.append({"event": "renumbered", "at": _now(), "taken": taken})


def _replaceable(last: list[Line]) -> bool:
    heartbeats = [line["event"] for line in last] == ["heartbeat", "heartbeat"]
    return heartbeats and last[1][METERED] - last[0][METERED] < HEARTBEAT_RETENTION_SECONDS


def _plain(fact: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(fact, float) and not math.isfinite(fact) else fact


def _now() -> str:
    """For the reader, and for what says whether a machine is still at it; no dollars are computed from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
