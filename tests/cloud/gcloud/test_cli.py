"""Calls of gcloud: the real program's answers with a stand-in for Google, and time limits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.gcloud import cli as gcloud_cli
from finetune.cloud.gcloud import quota
from finetune.cloud.gcloud.cli import ask
from tests.helpers.google_fixture import google_for_gcloud
from tests.helpers.json_server import JsonHandler


def error(code: int, message: str, reason: str) -> tuple[int, dict[str, Any]]:
    details = [{"message": message, "domain": "global", "reason": reason}]
    return code, {"error": {"code": code, "message": message, "errors": details}}


QUOTAS = [{"metric": "NVIDIA_T4_GPUS", "limit": 1.0, "usage": 0.0}, {"metric": "CPUS", "limit": 24.0, "usage": 8.0}]
DISABLED = "Compute Engine API has not been used in project 123456 before or it is disabled. Enable it by visiting ..."
NO_BUCKET = "jane.roe@example.com does not have storage.buckets.get access to the Google Cloud Storage bucket."
ANSWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "/compute/v1/projects/fine/regions": (200, {"items": [{"name": "us-central1", "quotas": QUOTAS}]}),
    "/compute/v1/projects/fine": (200, {"quotas": [{"metric": "GPUS_ALL_REGIONS", "limit": 1.0, "usage": 0.0}]}),
    "/compute/v1/projects/off/regions": error(403, DISABLED, "accessNotConfigured"),
    "/compute/v1/projects/forbidden/regions": error(403, "Required 'compute.regions.list' permission", "forbidden"),
    "/compute/v1/projects/gone/regions": error(404, "The resource 'projects/gone' was not found", "notFound"),
    "/compute/v1/projects/stale/regions": error(401, "Request had invalid authentication credentials.", "authError"),
    "/storage/v1/b/there": (200, {"kind": "storage#bucket", "name": "there", "location": "US-CENTRAL1"}),
    "/storage/v1/b/absent": error(404, "The specified bucket does not exist.", "notFound"),
    "/storage/v1/b/denied": error(403, NO_BUCKET, "forbidden"),
}


class Google(JsonHandler):
    def answer(self) -> tuple[int, dict[str, Any]]:
        return ANSWERS[self.path.partition("?")[0]]


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gcloud_cli, "SECONDS", 60.0)
    with google_for_gcloud(Google, tmp_path, monkeypatch):
        yield


def test_the_real_gcloud_answers_what_is_read(google: None) -> None:
    regions = ask(gcloud_cli.REGIONS, "--project=fine")
    assert quota.read_regions(regions.output)["us-central1"]["NVIDIA_T4_GPUS"] == quota.Quota(1, 0)
    project = ask(gcloud_cli.PROJECT, "--project=fine")
    assert quota.read_project(project.output) == {"GPUS_ALL_REGIONS": quota.Quota(1, 0)}
    bucket = ask(gcloud_cli.BUCKET, "gs://there", "--project=fine")
    assert json.loads(bucket.output) == {"location": "US-CENTRAL1"}


@pytest.mark.parametrize(
    ("question", "arguments", "trouble"),
    [
        (gcloud_cli.REGIONS, ["--project=off"], "the API is off in this project"),
        (gcloud_cli.REGIONS, ["--project=forbidden"], gcloud_cli.FORBIDDEN),
        (gcloud_cli.REGIONS, ["--project=gone"], gcloud_cli.NOT_FOUND),
        (gcloud_cli.REGIONS, ["--project=stale"], gcloud_cli.EXPIRED),
        (gcloud_cli.BUCKET, ["gs://absent", "--project=fine"], gcloud_cli.NOT_FOUND),
        (gcloud_cli.BUCKET, ["gs://denied", "--project=fine"], gcloud_cli.FORBIDDEN),
    ],
)
def test_the_real_gclouds_errors_are_recognised(
    google: None, question: tuple[str, ...], arguments: list[str], trouble: str
) -> None:
    answer = ask(question, *arguments)
    assert answer.trouble == trouble and answer.advice and not answer.output
    assert "jane" not in answer.trouble + answer.advice


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        (
            "There was a problem refreshing your current auth tokens: Reauthentication failed. cannot prompt during"
            " non-interactive execution.\nPlease run:\n\n  $ gcloud auth login",
            gcloud_cli.EXPIRED,
        ),
        (
            "There was a problem refreshing auth tokens for account jane.roe@example.com: ('invalid_grant: Bad Request',"
            " {'error': 'invalid_grant', 'error_description': 'Bad Request'})",
            gcloud_cli.EXPIRED,
        ),
        ("You do not currently have an active account selected.\nPlease run: ...", gcloud_cli.EXPIRED),
        (
            "There was a problem refreshing your current auth tokens: HTTPSConnectionPool(host='oauth2.googleapis.com',"
            " port=443): Max retries exceeded with url: /token (Caused by NameResolutionError(...))",
            "no connection to Google",
        ),
        (
            "FAILED_PRECONDITION: Billing account for project '1' is not found. Billing must be enabled for activation of"
            " service(s) 'compute.googleapis.com' to proceed.",
            "the project has no billing account",
        ),
        ("gcloud crashed (ValueError): something new with jane.roe@example.com", "gcloud failed"),
    ],
)
def test_other_known_errors_of_gcloud_are_recognised(text: str, trouble: str) -> None:
    found, advice = gcloud_cli.meaning(f"ERROR: (gcloud.compute.regions.list) {text}", "look by hand")
    assert found == trouble
    assert "jane" not in found + advice and ("by hand" in advice) is (trouble == "gcloud failed")


def test_a_hanging_gcloud_is_killed_with_its_child_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "gcloud"
    stand_in.write_text(f"#!/bin/sh\n/bin/sleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gcloud_cli, "SECONDS", 0.5)
    start = time.monotonic()
    answer = ask(gcloud_cli.REGIONS, "--project=p")
    assert time.monotonic() - start < 10
    assert answer.trouble == "no answer within 0.5 s" and "gcloud compute regions list" in answer.advice
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what gcloud started still runs")


def test_a_gcloud_that_cannot_be_started_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cannot be started" in ask(gcloud_cli.TOKEN).trouble
