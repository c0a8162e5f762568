"""What `doctor --cloud` says about logins, quotas, bucket and SkyPilot, with a stand-in program for gcloud."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cloud.gcloud import cli as gcloud_cli
from finetune.doctor import local as local_doctor
from finetune.doctor.check import Check
from finetune.doctor.cloud import cloud_checks, controller_check, gcloud_checks, sky_program_check

STAND_IN = f"""#!{sys.executable} -IS
import json, pathlib, sys, time
here, words = pathlib.Path(__file__).parent, " ".join(sys.argv[1:])
with (here / "calls").open("a") as calls:
    calls.write(words + "\\n")
for key, (output, error, code, seconds) in json.loads((here / "answers.json").read_text()).items():
    if key in words:
        time.sleep(seconds)
        print(output)
        sys.exit(error if error else code)
sys.exit("ERROR: unexpected call: " + words)
"""
"""Answers according to the first key that occurs in the command line."""
GPUS = ("T4", "V100", "L4", "A100", "A100_80GB", "H100")
REAUTH = (
    "ERROR: (gcloud.compute.regions.list) There was a problem refreshing auth tokens for account jane.roe@example.com:"
    " Reauthentication failed. cannot prompt during non-interactive execution.\nPlease run:\n\n  $ gcloud auth login\n"
)
DENIED = (
    "ERROR: (gcloud.storage.buckets.describe) [jane.roe@example.com] does not have permission to access b instance"
    " [finetune-my-project-jane-roe] (or it may not exist): jane.roe@example.com does not have storage.buckets.get access"
)
NO_BUCKET = "ERROR: (gcloud.storage.buckets.describe) gs://finetune-my-project-jane-roe not found: 404."

Limits = dict[str, float | tuple[float, float]]
Gcloud = Callable[..., Path]


def region(name: str, **limits: float | tuple[float, float]) -> dict[str, object]:
    """A region as gcloud lists it: every GPU 1 of 1 free, spot too, except `limits`; T4=0, spot_T4=(limit, usage)."""
    quotas: Limits = {"CPUS": 24, **{f"{kind}{gpu}": 1 for gpu in GPUS for kind in ("", "spot_")}, **limits}
    rows = []
    for key, value in quotas.items():
        limit, usage = value if isinstance(value, tuple) else (value, 0)
        gpu = key.removeprefix("spot_")
        metric = key if gpu == "CPUS" else f"{'PREEMPTIBLE_' * (gpu != key)}NVIDIA_{gpu}_GPUS"
        rows += [] if limit < -1 else [{"limit": float(limit), "metric": metric, "usage": float(usage)}]
    return {"name": name, "quotas": rows}


NOT_LISTED = -2
NOTHING: Limits = {f"{kind}{gpu}": 0 for gpu in GPUS for kind in ("", "spot_")}


def everywhere(limit: float, usage: float = 0) -> str:
    rows = [{"limit": 5.0, "metric": "NETWORKS", "usage": 1.0}, {"limit": limit, "metric": "GPUS_ALL_REGIONS"}]
    return json.dumps({"quotas": [rows[0], {**rows[1], "usage": usage}]})


@pytest.fixture(autouse=True)
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gcloud:
    """A user who is logged in, with a stand-in for gcloud; gcloud(regions=text, bucket=(output, error)) changes answers."""
    programs, folder = tmp_path / "bin", tmp_path / "home" / ".config" / "gcloud"
    programs.mkdir()
    (folder / "configurations").mkdir(parents=True)
    (folder / "active_config").write_text("default")
    core = "[core]\nproject = my-project\naccount = jane.roe@example.com\n"
    (folder / "configurations" / "config_default").write_text(core)
    user = {"type": "authorized_user", "refresh_token": "1//0SecretRefresh", "client_secret": "ClientSecret"}
    (folder / "application_default_credentials.json").write_text(json.dumps(user))
    for name in [name for name in os.environ if name.startswith(("CLOUDSDK_", "GOOGLE_", "GCLOUD_", "SKYPILOT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(programs))
    for name in ("gcloud", "rsync", "ssh"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)

    def change(seconds: float = 0, **answers: str | tuple[str, str]) -> Path:
        names = {
            "account": ("auth list", "jane.roe@example.com"),
            "configured": ("config get-value project", "my-project"),
            "token": ("print-access-token", "ya29.SecretToken"),
            "regions": ("regions list", json.dumps([region("us-central1"), region("europe-west4")])),
            "project": ("project-info describe", everywhere(1)),
            "bucket": ("buckets describe", json.dumps({"location": "US-CENTRAL1"})),
        }
        assert set(answers) <= set(names)
        found = {}
        for name, (key, usual) in names.items():
            answer = answers.get(name, usual)
            output, error = answer if isinstance(answer, tuple) else (answer, "")
            found[key] = (output, error, 0, seconds)
        (programs / "answers.json").write_text(json.dumps(found))
        return programs

    change()
    return change


def rows(regions: list[str] | None = None) -> dict[str, Check]:
    checks = cloud_checks("cloud", regions)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.advice for check in checks if check.status in ("missing", "warning"))
    table = local_doctor.render(checks)
    for secret in ("jane.roe", "jane-roe", "SecretToken", "SecretRefresh", "ClientSecret"):
        assert secret not in table
    return {check.name: check for check in checks}


def statuses(found: dict[str, Check]) -> set[str]:
    return {check.status for name, check in found.items() if name.startswith(("quota", "GPU"))}


# a ready account


def test_a_ready_account_has_no_failing_row_and_is_asked_about_the_right_project(gcloud: Gcloud) -> None:
    found = rows()
    failing = {name for name, check in found.items() if check.status in ("missing", "warning")}
    assert failing == {"sky program"}
    assert found["gcloud login"].found == "j...@example.com"
    assert found["quota T4 spot"].found == "1 in us-central1, europe-west4"
    assert found["quota T4 spot"].needed == "PREEMPTIBLE_NVIDIA_T4_GPUS"
    assert found["bucket"].found == "gs://finetune-my-project-j... in us-central1"
    calls = (gcloud() / "calls").read_text().splitlines()
    assert all(call.startswith("--quiet ") for call in calls)
    asked = [call for call in calls if "compute" in call or "storage" in call]
    assert len(asked) == 3 and all("--project=my-project" in call for call in asked)
    assert any("gs://finetune-my-project-jane-roe" in call for call in asked)


def test_for_training_google_is_not_queried(gcloud: Gcloud) -> None:
    assert [check.status for check in cloud_checks("train")] == ["ok", "ok"]
    assert len((gcloud() / "calls").read_text().splitlines()) == 2


# quotas


def test_gpus_without_quota_are_warnings_while_another_has_some(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1", A100=0, spot_A100=0), region("us-east1", A100=0, spot_A100=0)]))
    found = rows()
    assert (found["quota A100 spot"].status, found["quota A100 spot"].found) == ("warning", "0 everywhere")
    assert "PREEMPTIBLE_NVIDIA_A100_GPUS = 1 in us-central1" in found["quota A100 spot"].advice
    assert found["quota L4 spot"].status == found["quota L4 on-demand"].status == "ok"
    assert "--quota-id=PREEMPTIBLE-NVIDIA-A100-GPUS-per-project-region" in found["more quota"].advice


def test_no_quota_for_any_gpu_is_missing(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1", **NOTHING), region("us-east1", **NOTHING)]))
    found = rows()
    gpu_rows = [check for name, check in found.items() if name.startswith("quota ") and "regions" not in name]
    assert len(gpu_rows) == 11 and {check.status for check in gpu_rows} == {"missing"}
    assert local_doctor.exit_code(gpu_rows) == 1


def test_spot_uses_the_ordinary_quota_where_no_preemptible_one_is_listed(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1", spot_T4=NOT_LISTED, spot_L4=0)]))
    found = rows()
    assert (found["quota T4 spot"].status, found["quota T4 spot"].found) == ("ok", "1 in us-central1")
    assert found["quota L4 spot"].status == "warning"
    assert "SkyPilot skips regions whose spot quota is 0" in found["quota L4 spot"].advice


def test_a_gpu_that_is_listed_nowhere_has_no_quota(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1", V100=NOT_LISTED, spot_V100=NOT_LISTED)]))
    found = rows()
    assert found["quota V100 on-demand"].found == found["quota V100 spot"].found == "0 everywhere"
    assert "SkyPilot" not in found["quota V100 spot"].advice


def test_many_regions_are_summarised_and_the_given_ones_come_first(gcloud: Gcloud) -> None:
    names = ("asia-east1", "europe-west4", "us-central1", "us-east1", "us-west1")
    gcloud(regions=json.dumps([region(name, T4=4 if name == "us-west1" else 1) for name in names]))
    assert rows()["quota T4 on-demand"].found == "up to 4 in us-central1, us-east1 (+3 regions)"
    assert rows(["us-east1", "asia-east1"])["quota T4 on-demand"].found == "1 in us-east1, asia-east1"
    assert rows(["us-west1"])["quota T4 on-demand"].found == "4 in us-west1"


def test_quota_outside_the_given_regions_is_not_enough(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1"), region("us-east1", T4=0)]))
    found = rows(["us-east1", "mars-north1"])
    assert found["quota T4 on-demand"].found == "0 in us-east1, but 1 in us-central1"
    assert found["quota T4 on-demand"].status == "warning"
    assert "NVIDIA_T4_GPUS = 1 in us-east1" in found["quota T4 on-demand"].advice
    assert found["quota L4 on-demand"].found == "1 in us-east1"
    assert found["regions"].status == "warning" and "mars-north1" in found["regions"].found


def test_quota_that_is_used_up_is_a_warning(gcloud: Gcloud) -> None:
    gcloud(regions=json.dumps([region("us-central1", T4=(1, 1), L4=(2, 1))]), project=everywhere(1, 1))
    found = rows()
    assert found["quota T4 on-demand"].found == "1 in us-central1, all in use"
    assert found["quota T4 on-demand"].status == found["quota GPUs, all regions"].status == "warning"
    assert "sky status" in found["quota T4 on-demand"].advice
    assert "for more request NVIDIA_T4_GPUS = 2 in us-central1 on" in found["quota T4 on-demand"].advice
    assert "for more request GPUS_ALL_REGIONS = 2 on" in found["quota GPUs, all regions"].advice
    assert "--quota-id=NVIDIA-T4-GPUS-per-project-region --preferred-value=2 " in found["more quota"].advice
    assert found["quota L4 on-demand"].status == "ok"


def test_a_quota_of_0_over_all_regions_is_missing_whatever_the_regions_say(gcloud: Gcloud) -> None:
    gcloud(project=everywhere(0))
    found = rows()
    assert found["quota GPUs, all regions"].status == "missing"
    assert "request GPUS_ALL_REGIONS = 1 on console" in found["quota GPUs, all regions"].advice
    assert found["quota T4 spot"].status == "ok"


@pytest.mark.parametrize("text", ["", "nonsense", "{}", "[1]", "[]", '[{"name": "us-central1"}]', '[{"quotas": []}]'])
def test_an_unreadable_answer_is_a_row_and_not_a_traceback(gcloud: Gcloud, text: str) -> None:
    gcloud(regions=text, project=text, bucket=text)
    found = rows()
    assert found["GPU quotas"].status == found["quota GPUs, all regions"].status == "missing"
    assert statuses(found) == {"missing"}
    assert found["bucket"].status == "warning"


# logins


def test_an_expired_login_is_found_by_a_request(gcloud: Gcloud) -> None:
    failed = ("[]", REAUTH)
    gcloud(regions=failed, project=failed, bucket=failed, token=("", REAUTH))
    found = rows()
    assert found["gcloud login"].status == "missing" and "expired" in found["gcloud login"].found
    assert found["gcloud login"].advice == "run `gcloud auth login`"
    assert found["SkyPilot's login"].advice == "run `gcloud auth application-default login`"
    assert found["GPU quotas"].found == "expired or revoked" and found["bucket"].status == "missing"


def test_the_two_logins_expire_separately(gcloud: Gcloud) -> None:
    gcloud(token=("", REAUTH))
    found = rows()
    assert (found["gcloud login"].status, found["SkyPilot's login"].status) == ("ok", "missing")


def test_missing_settings_are_reported_without_a_request_to_google(gcloud: Gcloud, tmp_path: Path) -> None:
    (tmp_path / "home" / ".config" / "gcloud" / "application_default_credentials.json").unlink()
    found = rows()
    assert found["SkyPilot's login"].status == "missing"
    assert found["SkyPilot's login"].advice.startswith("~/.config/gcloud/application_default_credentials.json: missing")
    assert "compute" not in (gcloud() / "calls").read_text()


def test_gcloud_and_skypilot_in_different_projects_are_a_warning(
    gcloud: Gcloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "other-project")
    check = rows()["gcloud project"]
    assert (check.status, check.found) == ("warning", "my-project, but SkyPilot uses other-project")
    assert "--project=other-project" in (gcloud() / "calls").read_text()


@pytest.mark.parametrize(
    ("account", "project", "login", "configured"),
    [
        ("a@b.c", "my-project", "ok", "ok"),
        ("", "my-project", "missing", "ok"),
        ("a@b.c", "", "ok", "missing"),
        ("a@b.c", "(unset)", "ok", "missing"),
        (("", "crashed while loading"), ("", "crashed while loading"), "missing", "missing"),
    ],
)
def test_gcloud_needs_a_login_and_a_project(
    gcloud: Gcloud, account: str | tuple[str, str], project: str | tuple[str, str], login: str, configured: str
) -> None:
    gcloud(account=account, configured=project)
    assert [check.status for check in gcloud_checks("cloud")] == [login, configured]
    assert local_doctor.exit_code(gcloud_checks("train")) == 0


def test_gcloud_that_is_not_installed_is_one_row(gcloud: Gcloud) -> None:
    (gcloud() / "gcloud").unlink()
    (check,) = gcloud_checks("cloud")
    assert (check.status, check.found) == ("missing", "not on PATH")
    assert cloud_checks("train")[0].status == "warning"
    assert rows()["gcloud"].status == "missing"


def test_a_hanging_gcloud_takes_its_time_limit_once(gcloud: Gcloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcloud_cli, "SECONDS", 1.0)
    gcloud(seconds=60)
    start = time.monotonic()
    found = rows()
    assert time.monotonic() - start < 4
    assert found["gcloud login"].found == found["gcloud project"].found == "no answer"
    assert found["GPU quotas"].found == found["SkyPilot's login"].found == "no answer within 1 s"
    assert found["bucket"].status == "missing"


# bucket


@pytest.mark.parametrize(
    ("error", "status", "advice"),
    [
        (NO_BUCKET, "info", "created at the first launch"),
        (DENIED, "missing", "Storage Admin"),
        (REAUTH, "missing", "login"),
    ],
)
def test_a_missing_bucket_is_fine_and_a_forbidden_one_is_not(
    gcloud: Gcloud, error: str, status: str, advice: str
) -> None:
    gcloud(bucket=("", error))
    check = rows()["bucket"]
    assert check.status == status and advice in check.advice and "gs://finetune-my-project-j..." in check.found


# SkyPilot


def test_sky_must_be_the_one_of_this_environment(gcloud: Gcloud, monkeypatch: pytest.MonkeyPatch) -> None:
    check = sky_program_check("cloud")
    assert (check.status, check.found) == ("missing", "not on PATH") and "activate" in check.advice
    other = gcloud() / "sky"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    check = sky_program_check("cloud")
    assert check.status == "missing" and str(other) in check.found and ".sky.yaml" in check.advice
    other.unlink()
    other.symlink_to(Path(sysconfig.get_path("scripts")) / "pytest")  # as pipx and uv link programs
    assert sky_program_check("cloud").status == "ok"
    assert sky_program_check("train").status == "ok"


def test_a_launch_needs_the_programs_that_skypilot_copies_with(gcloud: Gcloud) -> None:
    assert rows()["rsync and ssh"].status == "ok"
    (gcloud() / "rsync").unlink()
    found = rows()["rsync and ssh"]
    assert (found.status, found.found) == ("missing", "not on PATH: rsync") and "install" in found.advice


def test_the_jobs_controller_costs_money_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".sky"
    assert "costs money" in controller_check().found
    folder.mkdir()
    for text in ("", "jobs:\n", "jobs: {controller: {resources: {cpus: 4}}}", "jobs: 3"):
        (folder / "config.yaml").write_text(text)
        assert "costs money" in controller_check().found
    (folder / "config.yaml").write_text("jobs: {controller: {consolidation_mode: true}}")
    check = controller_check()
    assert "on this machine" in check.found and "sky api stop" in check.advice
    (folder / ".jobs_controller_consolidation_reloaded_signal").touch()
    assert controller_check() == Check("jobs controller", "info", "on this machine (consolidation_mode)")
    (folder / "config.yaml").write_text("jobs: [")
    assert controller_check().status == "warning"
