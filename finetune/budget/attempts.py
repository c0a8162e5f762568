"""An attempt as its file in the ledger records it, and the account over several of them: seconds, prices, US dollars."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from finetune.machine import set_up
from finetune.machine.preemption import PREEMPTED
from finetune.machine.price import MachinePrice
from finetune.runtime.files import parse_json, read_bytes

METERED = "metered_seconds"
"""Key in a line: seconds on the attempt's meter."""
PRICE = "price"
"""The event of a new price."""
Work = Literal["train", "evaluate", "serve", "sweep"]
PREFIXES: dict[Work, str] = {"train": "attempt", "evaluate": "evaluation", "serve": "serving", "sweep": "sweep"}
"""How the name of a file begins, by what the attempt does."""
MOST_SECONDS, MOST_USD_PER_HOUR, MOST_STEPS = 1e9, 1e6, 10**12
"""More than any attempt or machine has: a larger number in a file is damage. 1e9 s are 30 years."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, as recorded in its file. number: among those of the same work.

    seconds: on the meter. price: of its machine, the newest one; None if it has none. It counts from `priced_from` on; the
    seconds before cost `usd_before`. step: the last one recorded. reason: why it ended; None while it runs, or if it was killed.
    seconds_before: the part of `seconds` before it began (boot, set-up). set_up: its parts, of the first attempt on a machine,
    once it has done a step. preempted: whether Google announced that it takes the machine back. heard_at: when its machine wrote
    the newest line, in seconds since the epoch. problems: what in the file cannot be used.
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
    heard_at: float | None = None

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


def read_attempt(number: int, path: Path, work: Work = "train") -> Attempt:
    """What a file says; what in it cannot be read or counted is among the attempt's problems."""
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
    return attempt_of(number, path.name, lines, tuple(bad), work)


def attempt_of(number: int, name: str, lines: list[Line], problems: tuple[str, ...], work: Work) -> Attempt:
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
        heard_at=max((time for line in lines if (time := _time(line.get("at"))) is not None), default=None),
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


def _seconds(line: Line) -> float | None:
    return _number(line.get(METERED), MOST_SECONDS)


def _time(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


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
