"""Training that ends with the score, in one managed job: a machine that is preempted while it scores, and vLLM's environment,
which is built in the background meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.reconciliation import check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.test_scenarios_preemption import sell_out, wait_for_job
from tests.emulated_cloud.training import SHORT, Run, launch

pytestmark = pytest.mark.cloud
ANSWER_SECONDS = 5
"""Six questions, two models: 60 s of answers. With 24 s the score was once complete before the machine had its notice."""
NOT_ANSWERED = "evaluation.max_new_tokens=255"
"""As in no other scenario, from which the bucket may have the base model's answers."""
VLLM_SECONDS = 45
"""For which set-up's background process is at work; SkyPilot has killed all that it can of a set-up 30 s after its end."""


def test_preempted_while_it_is_scored(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """The next machine goes on from the answers that were kept, without training again; one ledger, one budget."""
    slow = {"FT_ANSWER_SECONDS": ANSWER_SECONDS, "FINETUNE_VLLM_BUILD": 1, "FT_VLLM_SECONDS": VLLM_SECONDS}
    overrides = f"{SHORT} {NOT_ANSWERED}"
    words = launch(
        "train_spot", "--jobs", "-d", "-n", "judged", overrides=overrides, RUN_NAME="judged", EVALUATE=1, **slow
    )
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, "judged")
    first = environment.cloud.wait_for_machine("judged", 180)
    run.wait_for_status("done", 300)
    adapter = run.adapter_hash()
    before = run.wait_for_answers("base", 2, 300)
    sell_out(environment, first)
    environment.cloud.preempt(first)
    environment.cloud.wait_for_machine("judged", 300, other_than=first)
    line = wait_for_job(environment, "judged", "SUCCEEDED", 500)
    number = line.split()[0]  # by its name SkyPilot finds only a job that has not ended
    log = environment.sky.run("jobs", "logs", number, "--no-follow").ok().out
    print(line, log[-3000:])
    assert run.answers("base")[: len(before)] == before, "they were kept"
    assert len(run.answers("base")) == len(run.answers("tuned")) == 6
    assert {"eval.json", "report.html", "summary.json"} <= set(run.objects())
    record = run.record()
    assert (record["status"], record["attempts"], run.adapter_hash()) == ("done", 1, adapter), "it was trained once"
    account = run.account(tmp_path / "ledger")
    reasons = [(attempt.name, attempt.reason) for attempt in account.attempts]
    record_metric(f"preempted after {len(before)} answers of 12; ledger {reasons}")
    assert reasons[0] == ("attempt 1", "done") and reasons[2:] == [("evaluation 2", "scored")]
    assert reasons[1][0] == "evaluation 1" and reasons[1][1] in ("interrupted", None)
    assert "without vLLM: its packages could not be installed" in log, (
        "the machine reaches no registry; a build that had not outlived the set-up would have said nothing"
    )
    reconcile(run, tmp_path)
    check_nothing_left(environment)
