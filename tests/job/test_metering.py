"""The ledger's last line of a job whose machine is shut down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import AttemptLog, Ledger
from finetune.job import metering
from finetune.machine.price import Ceilings, MachinePrice


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[metering.Metering]:
    """On a machine with a price; SIGTERM ends the process as in `finetune job`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(metering, "machine_price", lambda: MachinePrice(0.36, "a test"))
    monkeypatch.setattr(metering, "provisioned", lambda: True)
    monkeypatch.setattr(metering, "facts", dict)

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    earlier = signal.signal(signal.SIGTERM, end)
    yield metering.Metering(Ledger(tmp_path / "ledger", "evaluate"), Ceilings())
    signal.signal(signal.SIGTERM, earlier)


def reason(tmp_path: Path) -> str | None:
    (attempt,) = Ledger(tmp_path / "ledger").account().attempts
    return attempt.reason


def test_a_signal_while_the_last_line_is_written_does_not_cost_it(
    meter: metering.Metering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AttemptLog.end

    def end(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the main thread gets it first
        real(*arguments)

    monkeypatch.setattr(AttemptLog, "end", end)
    with pytest.raises(SystemExit), meter.recorded():
        meter.ends("scored")
    assert reason(tmp_path) == "scored"


def test_a_signal_between_two_programs_is_an_interruption(meter: metering.Metering, tmp_path: Path) -> None:
    with pytest.raises(SystemExit), meter.recorded():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert reason(tmp_path) == "interrupted"


def test_another_error_is_a_failure(meter: metering.Metering, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), meter.recorded():
        raise ZeroDivisionError
    assert reason(tmp_path) == "failed"
