"""Task YAMLs that do not train, with the real SkyPilot on the emulated cloud."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.reconciliation import check_nothing_left
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import BUCKET, Run, launch
from tests.emulated_cloud.whole import NAME, Whole

pytestmark = pytest.mark.cloud


@pytest.mark.xdist_group("whole")
def test_a_run_is_scored(environment: CloudEnvironment, project: Path, whole: Whole) -> None:
    """`sky launch sky/evaluate.yaml` of a run in the bucket that has no score: scores both models and writes the report."""
    run = Run(environment, NAME)
    for name in environment.buckets.objects(BUCKET, "runs/"):
        if name.startswith((f"runs/{NAME}/eval", "runs/base/")) or name.endswith(("report.html", "summary.json")):
            environment.buckets.delete(BUCKET, name)
    assert "eval.json" not in run.objects()
    scored = environment.sky.run(
        *launch("evaluate", "-c", "score", "-i", "1", "--down", RUN_NAME=NAME), cwd=project
    ).ok()
    record_metric(f"launch to the report: {scored.seconds:.0f} s")
    assert {"eval.json", "report.html", "report.md", "summary.json"} <= set(run.objects())
    summary = json.loads(run.read("summary.json"))
    assert summary["status"] == whole.record["status"] == "done"
    environment.cloud.assert_empty(180)
    check_nothing_left(environment)
