"""GPU quotas as gcloud lists them, and the command that requests more."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.cloud.gcloud import quota
from finetune.cloud.gcloud.quota import Quota

REGIONS = [
    {
        "name": "us-central1",
        "quotas": [
            {"limit": 24, "metric": "CPUS", "usage": 0},
            {"limit": 1.0, "metric": "NVIDIA_T4_GPUS", "usage": 1.0},
            {"limit": -1, "metric": "NVIDIA_L4_GPUS", "owner": "x"},
        ],
    },
    {"name": "us-east1"},
    {"name": "us-west1", "quotas": []},
]


def test_regions_are_read_as_gcloud_prints_them_and_those_without_quotas_left_out() -> None:
    listed = quota.read_regions(json.dumps(REGIONS))
    assert set(listed) == {"us-central1"}
    assert listed["us-central1"]["NVIDIA_T4_GPUS"] == Quota(1, 1)
    assert listed["us-central1"]["NVIDIA_L4_GPUS"] == Quota(math.inf, 0)


def test_the_projects_quotas_are_read_too() -> None:
    text = json.dumps({"quotas": [{"limit": 0.0, "metric": "GPUS_ALL_REGIONS", "usage": 0.0}]})
    assert quota.read_project(text) == {"GPUS_ALL_REGIONS": Quota(0, 0)}
    assert quota.read_project("{}") == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", "nonsense", "{}", "null", "[1]", '[{"quotas": []}]', '[{"name": 3}]', '[{"name": "a", "quotas": 5}]'),
        '[{"name": "a", "quotas": ["b"]}]',
        '[{"name": "a", "quotas": [{"metric": "CPUS"}]}]',
        '[{"name": "a", "quotas": [{"metric": "CPUS", "limit": "many"}]}]',
        '[{"name": "a", "quotas": [{"metric": "CPUS", "limit": null}]}]',
        json.dumps(REGIONS)[:-5],
    ],
)
def test_anything_else_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        quota.read_regions(text)
    if text != "{}":
        with pytest.raises(ValueError):
            quota.read_project(text)


@pytest.mark.parametrize(
    ("gpu", "spot", "name"),
    [
        ("T4", False, "NVIDIA_T4_GPUS"),
        ("T4", True, "PREEMPTIBLE_NVIDIA_T4_GPUS"),
        ("A100-80GB", True, "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS"),
    ],
)
def test_a_quotas_name(gpu: str, spot: bool, name: str) -> None:
    assert quota.metric(gpu, spot) == name


@pytest.mark.parametrize(
    ("ordinary", "preemptible", "on_demand", "spot", "passed_over"),
    [
        (1, 2, 1, 2, False),
        (0, 2, 0, 2, False),
        (1, None, 1, 1, False),
        (1, 0, 1, 0, True),
        (0, 0, 0, 0, False),
        (None, None, 0, 0, False),
        (None, 1, 0, 1, False),
    ],
)
def test_spot_uses_the_ordinary_quota_only_if_no_preemptible_one_is_listed(
    ordinary: int | None, preemptible: int | None, on_demand: int, spot: int, passed_over: bool
) -> None:
    listed = {"NVIDIA_T4_GPUS": ordinary, "PREEMPTIBLE_NVIDIA_T4_GPUS": preemptible, "NVIDIA_L4_GPUS": 8}
    quotas = {name: Quota(limit, 0) for name, limit in listed.items() if limit is not None}
    assert quota.usable(quotas, "T4", spot=False).limit == on_demand
    assert quota.usable(quotas, "T4", spot=True).limit == spot
    assert quota.passed_over(quotas, "T4") is passed_over


def test_how_to_request_names_the_quota_the_region_and_the_page() -> None:
    text = quota.how_to_request("NVIDIA_T4_GPUS", "us-east1")
    assert "NVIDIA_T4_GPUS = 1 in us-east1" in text and "console.cloud.google.com/iam-admin/quotas" in text
    assert " in " not in quota.how_to_request("GPUS_ALL_REGIONS").partition(" on ")[0]


@pytest.mark.parametrize(
    ("metric", "region", "quota_id"),
    [
        ("PREEMPTIBLE_NVIDIA_T4_GPUS", "us-east1", "PREEMPTIBLE-NVIDIA-T4-GPUS-per-project-region"),
        ("GPUS_ALL_REGIONS", "", "GPUS-ALL-REGIONS-per-project"),
    ],
)
def test_the_command_that_requests_quota_is_known_to_gcloud(
    metric: str, region: str, quota_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(quota.request_command(metric, "my-project", region).replace("<your address>", "me@example.com"))
    assert f"--quota-id={quota_id}" in words and "--project=my-project" in words
    assert ("--dimensions=region=us-east1" in words) is bool(region)
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    answer = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert "active account" in answer.stderr, answer.stderr  # it parsed the command, and only lacks a login
