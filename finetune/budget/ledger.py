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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError
from finetune.machine import set_up
from finetune.machine.preemption import PREEMPTED
from finetune.machine.price import MachinePrice
from finetune.runtime import fault_injection
from finetune.runtime.confined import remove_file
from finetune.runtime.files import atomic_file, disk_error, names_in, parse_json, read_bytes

HEARTBEAT_RETENTION_SECONDS = 600.0
"""A heartbeat replaces the previous one, except that one per this many seconds is kept: the file of a long run stays small."""
METERED = "metered_seconds"
"""Key in a line: seconds on the attempt's meter."""
PRICE = "price"
"""The event of a new price."""
Work = Literal["train", "evaluate", "serve", "sweep"]
PREFIXES: dict[Work, str] = {"train": "attempt", "evaluate": "evaluation", "serve": "serving", "sweep": "sweep"}
"""How the name of a file begins, by what the attempt does."""
_WORK = {prefix: work for work, prefix in PREFIXES.items()}
_NAME = re.compile(rf"({'|'.join(_WORK)})-([0-9]{{3,9}})\.jsonl")
MOST_SECONDS, MOST_USD_PER_HOUR, MOST_STEPS = 1e9, 1e6, 10**12
"""More than any attempt or machine has: a larger number in a file is damage. 1e9 s are 30 years."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, as recorded in its file. number: among those of the same work.

    seconds: on the meter. price: of its machine, the newest one; None if it has none. It counts from `priced_from` on; the
    seconds before cost `usd_before`. step: the last one recorded. reason: why it ended; None while it runs, or if it was killed.
    seconds_before: the part of `seconds` before it began (boot, set-up). set_up: its parts, of the first attempt on a machine,
    once it has done a step. preempted: whether Google announced that it takes the machine back. problems: what in the file
    cannot be used.
    """

    number: int
    file: str
    seconds: float = 0.0
    price: MachinePrice | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    began_at: str | None = None
    resumed_step: int | None = None
    step: int | None = None
    reason: str | None = None
    token: str | None = None
    seconds_before: float = 0.0
    problems: tuple[str, ...] = ()
    work: Work = "train"
    usd_before: float = 0.0
    priced_from: float = 0.0
    set_up: set_up.SetUp | None = None
    preempted: bool = False

    @property
    def name(self) -> str:
        return f"{PREFIXES[self.work]} {self.number}"

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def usd_per_hour(self) -> float | None:
        return None if self.price is None else self.price.usd_per_hour

    @property
    def usd(self) -> float | None:
        if self.price is None:
            return None
        return self.usd_before + (self.seconds - self.priced_from) / 3600 * self.price.usd_per_hour

    @property
    def zone(self) -> str | None:
        return self.machine.get("zone")

    @property
    def gpu(self) -> str | None:
        return self.machine.get("gpu")

    @property
    def spot(self) -> bool | None:
        return self.machine.get("spot")


@dataclass(frozen=True)
class Account:
    """All attempts of a run, in order. problems: what could not be read or counted, one line each."""

    attempts: tuple[Attempt, ...]
    problems: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        return sum(attempt.hours for attempt in self.attempts)

    @property
    def usd(self) -> float | None:
        """US dollars of the attempts that have a price; None where none has one."""
        priced = [attempt.usd for attempt in self.attempts if attempt.usd is not None]
        return sum(priced) if priced else None

    def of(self, work: Work) -> Account:
        """The part of the attempts that do this work."""
        return Account(tuple(attempt for attempt in self.attempts if attempt.work == work), self.problems)


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
            attempt = _read(number, path, work)
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
            for orphan in folder.glob(
                f".{PREFIXES[self._ledger.work]}-*.jsonl.*.tmp"
            ):  # of attempts that were killed while writing
                remove_file(orphan, inside=folder)
        except OSError as error:
            raise disk_error(error, folder) from error
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
            return _attempt(self.number, self.path.name, self._lines, (), self._ledger.work)

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
        owner = _read(self.number, self.path).token if self.path.exists() else None
        if owner in (None, self._lines[0]["token"]) and (self._written or not self.path.exists()):
            return
        taken, free = self.number, self._ledger.next_attempt()
        self._lines[0]["attempt"] = free
        self._lines.append({"event": "renumbered", "at": _now(), "taken": taken})


def _read(number: int, path: Path, work: Work = "train") -> Attempt:
    try:
        if not path.is_file():  # a FIFO would never end
            return Attempt(number, path.name, problems=("not readable (not a file); not counted",), work=work)
        rows = read_bytes(path).decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        return Attempt(number, path.name, problems=(f"not readable ({error.strerror}); not counted",), work=work)
    lines, bad = [], []
    for count, row in enumerate(rows, 1):
        line = _line(row)
        if line is not None:
            lines.append(line)
        elif row.strip():
            which = "the last line is torn" if count == len(rows) else f"line {count} is not readable"
            bad.append(f"{which} and left out")
    if not lines:
        bad = ["nothing in it is readable; not counted"]
    elif lines[0]["event"] != "begin":
        bad.append("its first line is missing, and so is the price")
    return _attempt(number, path.name, lines, tuple(bad), work)


def _attempt(number: int, name: str, lines: list[Line], problems: tuple[str, ...], work: Work) -> Attempt:
    first = next((line for line in lines if line["event"] == "begin"), {})
    machine, token, began_at, resumed = (first.get(key) for key in ("machine", "token", "at", "step"))
    facts = machine.items() if isinstance(machine, dict) else ()
    price, usd_before, priced_from = _prices(first, lines)
    stepped = next((line for line in lines if line["event"] == set_up.EVENT), {})
    return Attempt(
        number,
        name,
        seconds=max((seconds for line in lines if (seconds := _seconds(line)) is not None), default=0.0),
        price=price,
        machine={key: fact for key, fact in facts if isinstance(fact, bool if key == "spot" else str)},
        began_at=began_at if isinstance(began_at, str) else None,
        resumed_step=_step(resumed),
        step=next((step for line in reversed(lines) if (step := _step(line.get("step"))) is not None), None),
        reason=next((str(line.get("reason")) for line in reversed(lines) if line["event"] == "end"), None),
        token=token if isinstance(token, str) else None,
        seconds_before=_seconds(first) or 0.0,
        problems=(*problems, *_implausible(lines)),
        work=work,
        usd_before=usd_before,
        priced_from=priced_from,
        set_up=set_up.from_line(stepped),
        preempted=any(line["event"] == PREEMPTED for line in lines),
    )


def _prices(begin: Line, lines: list[Line]) -> tuple[MachinePrice | None, float, float]:
    """The newest price, the US dollars of the seconds before it, and from which second on it counts."""
    price, usd, since = _price(begin), 0.0, 0.0
    for line in lines:
        newer, seconds = (_price(line), _seconds(line)) if line["event"] == PRICE else (None, None)
        if newer is None or seconds is None or seconds < since:
            continue
        usd += (seconds - since) / 3600 * (price.usd_per_hour if price else 0.0)
        price, since = newer, seconds
    return price, usd, since


def _price(line: Line) -> MachinePrice | None:
    usd_per_hour = _number(line.get("usd_per_hour"), MOST_USD_PER_HOUR)
    return None if usd_per_hour is None else MachinePrice(usd_per_hour, str(line.get("basis") or ""))


def _line(row: str) -> Line | None:
    try:
        line = parse_json(row, nan=True)  # each number is checked where it is used
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("event"), str) else None


def _replaceable(last: list[Line]) -> bool:
    heartbeats = [line["event"] for line in last] == ["heartbeat", "heartbeat"]
    return heartbeats and last[1][METERED] - last[0][METERED] < HEARTBEAT_RETENTION_SECONDS


def _plain(fact: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(fact, float) and not math.isfinite(fact) else fact


def _seconds(line: Line) -> float | None:
    return _number(line.get(METERED), MOST_SECONDS)


def _step(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_STEPS else None


def _number(value: Any, most: float) -> float | None:
    """A number from 0 to `most`; None for anything else that a corrupt file may hold."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most  # false for NaN
    return float(value) if fits else None


def _implausible(lines: list[Line]) -> list[str]:
    """What a file says about seconds and dollars that no attempt can have: left out of the account, but never silently."""
    limits = {METERED: MOST_SECONDS, "usd_per_hour": MOST_USD_PER_HOUR}
    return [
        f"{key} {str(line[key])[:40]!r} is not a number from 0 to {most:g} and left out"
        for line in lines
        for key, most in limits.items()
        if line.get(key) is not None and _number(line[key], most) is None
    ][:3]


def _now() -> str:
    """For the reader; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
