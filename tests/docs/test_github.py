"""What GitHub reads: the workflow runs what a developer runs, and the issue forms are forms."""

from __future__ import annotations

import re

import yaml

from tests.helpers.doc_pages import DOCS, ROOT


def test_the_workflow_runs_ci_run_with_the_pinned_python() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    [job] = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90 and "python:3.11" in job["container"]["image"]
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    [cache] = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@")]
    assert cache["path"] == job["env"]["PIP_CACHE_DIR"] and "constraints.txt" in cache["key"]
    assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_issue_templates_have_what_github_asks_for() -> None:
    templates = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert {path.stem for path in templates} == {"bug", "feature"}
    for path in templates:
        _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
        assert {"name", "about"} <= yaml.safe_load(front).keys() and len(body.splitlines()) < 25


def test_every_part_of_ci_has_its_seconds() -> None:
    parts = re.findall(r'^part "([^"]+)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    rows = re.findall(r"^\| ([^|(:]+?) ?(?:[(:][^|]*)?\|", (DOCS / "testing.md").read_text(encoding="utf-8"), re.M)
    assert len(parts) > 6
    assert set(parts) <= {row.strip() for row in rows}
