"""Compares, at the end of a scenario, SkyPilot's view, the emulated Google's bill and our ledger."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune.budget.attempts import Account, Attempt
from finetune.cloud.catalog.disks import disk_usd_per_hour
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce_bill import Price, Stretch
from tests.emulated_cloud.gce_prices import PriceList
from tests.emulated_cloud.pace import PACE
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import Run

TOLERANCE = 0.02
DISK_TIER = "medium"


def catalog_price(prices: PriceList) -> Price:
    """US dollars per hour by the published catalog (host and GPU in the zone) and the disk's list price; where prices changed
    meanwhile, the mean over the stretch."""

    def price(stretch: Stretch) -> float:
        ended = stretch.ended if stretch.ended is not None else time.time()
        parts = prices.spans(stretch.began, ended)
        if len(parts) == 1 or not ended > stretch.began:
            return price_at(prices, stretch, stretch.began)
        usd = sum((until - since) * price_at(prices, stretch, since) for since, until in parts)
        return usd / (ended - stretch.began)

    return price


def price_at(prices: PriceList, stretch: Stretch, moment: float) -> float:
    """moment: in seconds since the epoch."""
    disk = disk_usd_per_hour(stretch.disk_gb, DISK_TIER, stretch.zone.rpartition("-")[0], stretch.machine_type)
    if not stretch.running:
        return disk
    column = "SpotPrice" if stretch.spot else "Price"
    here = [row for row in prices.rows(moment) if row["AvailabilityZone"] == stretch.zone]
    host = [row for row in here if row["InstanceType"] == stretch.machine_type]
    gpu = [
        row
        for row in here
        if not row["InstanceType"]
        and row["AcceleratorName"] == stretch.gpu
        and float(row["AcceleratorCount"]) == stretch.gpus
    ]
    return sum(float(row[column]) for row in (host[0], gpu[0])) + disk


@dataclass(frozen=True)
class Reconciliation:
    """Seconds and US dollars of a run's machines, by the bill and by our ledger.

    bill_usd: the whole bill. tail_seconds, tail_usd: of machines on which an attempt ended by itself, the idle time from its last
    write to the bucket (by the bucket's clock) until autostop, a controller or a preemption ended the machine, which no ledger
    on that machine can record.
    """

    bill_seconds: float
    bill_usd: float
    ledger_seconds: float
    ledger_usd: float
    tail_seconds: float
    tail_usd: float

    @property
    def difference(self) -> float:
        """Relative difference of the ledger from the bill without the tails."""
        return self.ledger_usd / (self.bill_usd - self.tail_usd) - 1

    def __str__(self) -> str:
        return (
            f"bill {self.bill_seconds:.1f} s ${self.bill_usd:.4f}, of that idle after a run's end {self.tail_seconds:.1f} s "
            f"${self.tail_usd:.4f}; ledger {self.ledger_seconds:.1f} s ${self.ledger_usd:.4f} ({self.difference:+.2%})"
        )


def reconcile(run: Run, folder: Path) -> Reconciliation:
    """Compares the bill with the ledger (fetched into `folder`) of the only run on the machines, and prints both.

    Raises AssertionError if they differ by more than 2%, if a machine has no attempt or an attempt no machine, or if the ledger
    has a wrong zone, kind or price of a machine.
    """
    bill, account = run.environment.cloud.bill, run.account(folder)
    prices = run.environment.cloud.prices
    price = catalog_price(prices)
    print(bill.table(price))
    stretches = [one for one in bill.stretches if one.running]
    assert not account.problems, account.problems
    on_each = [attempts_on(stretch, stretches, account) for stretch in stretches]
    assert sum(map(len, on_each)) == len(account.attempts), (stretches, account.attempts)
    for stretch, attempts in zip(stretches, on_each, strict=True):
        assert attempts, (stretch, account.attempts)
        for attempt in attempts:
            assert attempt.began_at is not None
            at = datetime.fromisoformat(attempt.began_at).timestamp()
            check_machine(stretch, attempt, price_at(prices, stretch, at))
            record_metric(
                f"{attempt.name}: a start of {attempt.seconds_before:.1f} s; {attempt.seconds:.1f} s in the ledger, "
                f"{stretch.seconds:.1f} s on the bill"
            )
        PACE.starts.append(attempts[0].seconds_before)
    tails = [idle(run, stretch, attempts[-1]) for stretch, attempts in zip(stretches, on_each, strict=True)]
    assert account.usd is not None
    result = Reconciliation(
        bill_seconds=sum(one.seconds for one in stretches),
        bill_usd=bill.usd(price),
        ledger_seconds=sum(one.seconds for one in account.attempts),
        ledger_usd=account.usd,
        tail_seconds=sum(tails),
        tail_usd=sum(tail * price(stretch) / 3600 for tail, stretch in zip(tails, stretches, strict=True)),
    )
    record_metric(str(result))
    assert abs(result.difference) < TOLERANCE, str(result)
    return result


def attempts_on(stretch: Stretch, stretches: list[Stretch], account: Account) -> list[Attempt]:
    """In the order of their beginning. A machine that was stopped and started has one attempt for each of its stretches; any
    other may have several, such as training and its evaluation."""
    own = [one for one in stretches if one.machine == stretch.machine]
    there = [attempt for attempt in account.attempts if attempt.machine.get("name") == stretch.machine]
    there.sort(key=lambda attempt: (attempt.began_at or "", attempt.work != "train"))
    if len(own) == 1:
        return there
    assert len(own) == len(there), (own, there)
    return [there[own.index(stretch)]]


def idle(run: Run, stretch: Stretch, attempt: Attempt) -> float:
    """Idle seconds of a machine after an attempt that ended by itself; 0 after one that ended with its machine."""
    if attempt.reason is None:
        return 0.0
    assert stretch.ended is not None
    return max(0.0, stretch.ended - run.updated(f"ledger/{attempt.file}"))


def check_machine(stretch: Stretch, attempt: Attempt, usd_per_hour: float) -> None:
    recorded = (attempt.zone, attempt.gpu, attempt.spot)
    assert recorded == (stretch.zone, stretch.gpu, stretch.spot), (
        f"attempt {attempt.number} of {stretch.machine} says {recorded}"
    )
    assert attempt.usd_per_hour is not None
    assert abs(attempt.usd_per_hour - usd_per_hour) < 1e-4, (attempt.usd_per_hour, usd_per_hour)


def check_nothing_left(environment: CloudEnvironment) -> None:
    """Asserts that neither SkyPilot nor the cloud has a machine."""
    alone = ("--no-show-managed-jobs", "--no-show-services")  # each would start another process
    status = environment.sky.run("status", "--refresh", *alone).ok().out
    assert "No existing clusters" in status, status
    environment.cloud.assert_empty()
