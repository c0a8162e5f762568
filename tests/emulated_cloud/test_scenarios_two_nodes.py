"""`num_nodes: 2` in a managed job: two machines train one run, and the loss of one of them is the recovery of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce_instances import RUNNING, Instance
from tests.emulated_cloud.pace import patience, wait_until
from tests.emulated_cloud.reconciliation import TOLERANCE, catalog_price, check_nothing_left
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.test_scenarios_preemption import sell_out, wait_for_job
from tests.emulated_cloud.training import SAVE_STEPS, STEPS, Run, launch

pytestmark = pytest.mark.cloud


def test_two_nodes(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    words = launch(
        "train_spot", "--jobs", "-d", "-n", "nodes", "--num-nodes", "2", RUN_NAME="nodes", FT_STEP_SECONDS="0.1"
    )
    environment.sky.run(*words, cwd=project).ok()
    run, cloud = Run(environment, "nodes"), environment.cloud
    first = both(environment)
    run.wait_for_step(2 * SAVE_STEPS, 400)
    assert run.record()["step"]["ranks"] == 2

    second = [machine for machine in first if machine.name != head_of(run, tmp_path / "before")]
    assert len(second) == 1, "one of the two keeps the ledger"
    sell_out(environment, second[0])
    cloud.preempt(second[0])
    both(environment, other_than=first)
    run.wait_for_status("done", 500)
    queue = wait_for_job(environment, "nodes", "SUCCEEDED")
    print(queue)

    record = run.record()
    assert (record["status"], record["steps"]["done"], record["attempts"]) == ("done", STEPS, 2)
    account = run.account(tmp_path)
    assert [attempt.reason for attempt in account.attempts] == ["interrupted", "done"]
    assert (account.attempts[1].resumed_step or 0) >= 2 * SAVE_STEPS, "the checkpoint of the notice, or the one before"
    check_bill(run, tmp_path)
    check_nothing_left(environment)


def both(environment: CloudEnvironment, other_than: list[Instance] | None = None) -> list[Instance]:
    """Waits until two machines run that are none of these, and returns them."""
    found: list[Instance] = []

    def ready() -> bool:
        there = [one for one in environment.cloud.machines("nodes") if one.status == RUNNING]
        found[:] = [one for one in there if one not in (other_than or [])]
        return len(found) == 2

    wait_until(ready, patience(300), lambda waited: f"{len(found)} new machines after {waited:.0f} s")
    return list(found)


def head_of(run: Run, folder: Path) -> str | None:
    """The name of the machine that keeps the ledger."""
    return run.account(folder).attempts[-1].machine.get("name")


def check_bill(run: Run, folder: Path) -> None:
    """The ledger, which the first node keeps at the price of both, against the bill of all machines, without the time after an
    attempt, in which they wait to be taken down. Each attempt was in a zone of its own."""
    environment, account = run.environment, run.account(folder)
    bill, price = environment.cloud.bill, catalog_price(environment.cloud.prices)
    print(bill.table(price))
    stretches = [one for one in bill.stretches if one.running]
    assert len(stretches) == 4, stretches
    by_zone = {attempt.zone: attempt for attempt in account.attempts}
    assert len(by_zone) == 2 and {one.zone for one in stretches} == by_zone.keys()
    tails = 0.0
    for one in stretches:
        attempt = by_zone[one.zone]
        assert one.ended is not None and attempt.usd_per_hour == pytest.approx(2 * price(one), abs=1e-3)
        tail = max(0.0, one.ended - run.updated(f"ledger/{attempt.file}"))
        tails += tail * price(one) / 3600
        record_metric(
            f"{attempt.name}, {one.machine}: {one.seconds:.1f} s on the bill, of that {tail:.1f} s after the attempt; in the "
            f"ledger {attempt.seconds:.1f} s of both at ${attempt.usd_per_hour:.3f}/h"
        )
    assert account.usd is not None
    difference = account.usd / (bill.usd(price) - tails) - 1
    record_metric(
        f"two nodes: bill ${bill.usd(price):.4f}, idle ${tails:.4f}, ledger ${account.usd:.4f} ({difference:+.2%})"
    )
    assert abs(difference) < 2 * TOLERANCE, "the nodes do not boot in the same second"
