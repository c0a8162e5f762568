"""Who is logged in, read from files in gcloud's format; compared with google.auth, gcloud and SkyPilot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.cloud.gcloud.config import Login, bucket_name, local_login
from finetune.errors import UserError
from tests.helpers.errors import raises

USER = {
    "account": "",
    "client_id": "1234.apps.googleusercontent.com",
    "client_secret": "not-a-secret",
    "quota_project_id": "billed-project",
    "refresh_token": "1//not-a-token",
    "type": "authorized_user",
    "universe_domain": "googleapis.com",
}
ROBOT = {
    "type": "service_account",
    "project_id": "robot-project",
    "private_key_id": "0",
    "client_email": "trainer@robot-project.iam.gserviceaccount.com",
    "token_uri": "https://oauth2.googleapis.com/token",
}
CORE = "[core]\naccount = jane.roe@example.com\nproject = my-project\n"

Setup = Callable[..., Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of the variables that say who is logged in."""
    for name in list(os.environ):
        if name.startswith(("CLOUDSDK_", "GOOGLE_", "GCLOUD_", "SKYPILOT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def gcloud(home: Path) -> Setup:
    """gcloud(credentials, name=text of that configuration, ...): its folder, the first configuration active."""

    def make(credentials: Any = USER, folder: str = ".config/gcloud", **configurations: str) -> Path:
        path = home / folder
        (path / "configurations").mkdir(parents=True)
        for name, text in configurations.items():
            (path / "configurations" / f"config_{name}").write_text(text)
        if configurations:
            (path / "active_config").write_text(next(iter(configurations)))
        if credentials is not None:
            text = credentials if isinstance(credentials, str) else json.dumps(credentials)
            (path / "application_default_credentials.json").write_text(text)
        return path

    return make


# account and project


def test_account_and_project_come_from_the_active_configuration(gcloud: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gcloud(work=CORE, default="[core]\naccount = me@example.org\nproject = private-project\n")
    assert local_login() == Login("my-project", "jane.roe@example.com")
    (folder / "active_config").write_text("default")
    assert local_login() == Login("private-project", "me@example.org")
    monkeypatch.setenv("CLOUDSDK_ACTIVE_CONFIG_NAME", "work")
    assert local_login() == Login("my-project", "jane.roe@example.com")


def test_gclouds_folder_can_be_elsewhere(gcloud: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(gcloud(folder="elsewhere", default=CORE)))
    assert local_login().project == "my-project"


def test_variables_come_before_the_configuration(gcloud: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    gcloud(default=CORE)
    monkeypatch.setenv("CLOUDSDK_CORE_ACCOUNT", "other@example.com")
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "variable-project")
    assert local_login() == Login("variable-project", "other@example.com")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "louder-project")
    assert local_login().project == "louder-project"


def test_a_key_file_names_project_and_account_where_gcloud_has_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, gcloud: Setup
) -> None:
    (home / "key.json").write_text(json.dumps(ROBOT))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(home / "key.json"))
    assert local_login() == Login("robot-project", "trainer@robot-project.iam.gserviceaccount.com")
    gcloud(default=CORE)
    assert local_login() == Login("robot-project", "jane.roe@example.com")


def test_skypilots_own_project_comes_first(gcloud: Setup, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gcloud(default=CORE)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "louder-project")
    (home / ".sky").mkdir()
    workspaces = "workspaces:\n  default: {}\n  lab:\n    gcp: {project_id: lab-project}\n"
    (home / ".sky" / "config.yaml").write_text(workspaces)
    assert local_login().project == "louder-project"
    (home / ".sky" / "config.yaml").write_text(workspaces + "active_workspace: lab\n")
    assert local_login().project == "lab-project"


def test_an_account_is_not_in_the_repr() -> None:
    assert "jane" not in repr(Login("my-project", "jane.roe@example.com"))


# what is missing or broken: one line that names the file and the command


@pytest.mark.parametrize(
    ("credentials", "configuration", "code", "names"),
    [
        (
            None,
            CORE,
            "gcloud.missing_credentials",
            ["application_default_credentials.json", "gcloud auth application-default login"],
        ),
        (
            "",
            CORE,
            "gcloud.bad_credentials",
            ["application_default_credentials.json", "gcloud auth application-default login"],
        ),
        (
            json.dumps(USER)[:-9],
            CORE,
            "gcloud.bad_credentials",
            ["application_default_credentials.json", "application-default login"],
        ),
        ("[1]", CORE, "gcloud.bad_credentials", ["application_default_credentials.json", "application-default login"]),
        (
            {"type": "odd"},
            CORE,
            "gcloud.bad_credentials",
            ["application_default_credentials.json", "application-default login"],
        ),
        (
            {**ROBOT, "project_id": ["x"]},
            CORE,
            "gcloud.bad_credentials",
            ["application_default_credentials.json", "project_id"],
        ),
        (USER, "[core]\naccount = a@b.c\n", "gcloud.no_project", ["gcloud config set project"]),
        (USER, "[core]\nproject = p\n", "gcloud.not_logged_in", ["gcloud auth login"]),
        (USER, "", "gcloud.no_project", ["gcloud config set project"]),
        (USER, "account = a@b.c\n", "gcloud.bad_config", ["config_default", "gcloud init"]),
        (USER, "[core]\nproject = a\nproject = b\n", "gcloud.bad_config", ["config_default", "gcloud init"]),
    ],
)
def test_what_is_missing_or_broken_is_one_line_with_the_command(
    gcloud: Setup, credentials: Any, configuration: str, code: str, names: list[str]
) -> None:
    gcloud(credentials, default=configuration)
    with raises(code) as caught:
        local_login()
    message = str(caught.value)
    assert "jane" not in message and "1//" not in message
    assert all(name in message for name in names), message


def test_without_gcloud_it_says_so() -> None:
    with raises("gcloud.not_set_up", match=r"nobody is logged in to Google here; .*`gcloud auth login`"):
        local_login()


def test_files_that_are_not_text_or_not_a_name_are_named(gcloud: Setup) -> None:
    folder = gcloud(default=CORE)
    (folder / "active_config").write_text("default\n")  # gcloud reads the line end as part of the name
    with raises("gcloud.bad_config", match="active_config"):
        local_login()
    (folder / "active_config").write_text("default")
    (folder / "configurations" / "config_default").write_bytes(b"[core]\nproject = \xff\n")
    with raises("gcloud.bad_config", match="config_default"):
        local_login()


def test_a_key_file_that_is_missing_or_names_no_project(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(home / "key.json"))
    with raises("gcloud.missing_credentials", match="GOOGLE_APPLICATION_CREDENTIALS"):
        local_login()
    (home / "key.json").write_text(json.dumps(USER))
    with raises("gcloud.no_project", match="GOOGLE_CLOUD_PROJECT"):
        local_login()


def test_a_broken_config_of_skypilot_is_named(gcloud: Setup, home: Path) -> None:
    gcloud(default=CORE)
    (home / ".sky").mkdir()
    (home / ".sky" / "config.yaml").write_text("workspaces: [")
    with raises("cloud.bad_skypilot_config", match=r"config\.yaml"):
        local_login()


# compared with the real programs


@pytest.mark.parametrize(
    ("active", "variables"),
    [
        ("work", {}),
        ("NONE", {}),
        ("", {}),
        (None, {}),
        ("work", {"CLOUDSDK_ACTIVE_CONFIG_NAME": "default"}),
        ("work", {"CLOUDSDK_CORE_PROJECT": "variable-project", "CLOUDSDK_CORE_ACCOUNT": "v@example.com"}),
        ("work", {"CLOUDSDK_CORE_PROJECT": ""}),
        ("work", {"GCLOUD_PROJECT": "old-project"}),
        ("work", {"GOOGLE_CLOUD_PROJECT": "", "GCLOUD_PROJECT": "old-project"}),
    ],
)
def test_google_auth_and_gcloud_find_the_same(
    gcloud: Setup, monkeypatch: pytest.MonkeyPatch, active: str | None, variables: dict[str, str]
) -> None:
    auth = pytest.importorskip("google.auth", reason="comes with the extra cloud")
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    folder = gcloud(work=CORE, default="[core]\naccount = me@example.org\nproject = private-project\n")
    if active is None:
        (folder / "active_config").unlink()
    else:
        (folder / "active_config").write_text(active)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        found: Login | None = local_login()
    except UserError:
        found = None
    _, project = auth.default()
    account = subprocess.run(["gcloud", "config", "get", "account"], check=True, capture_output=True, text=True)
    assert (found.project if found else None) == project
    if found:
        assert found.account == account.stdout.strip()


@pytest.mark.slow
def test_skypilot_finds_the_same_project_and_accepts_the_buckets_name(gcloud: Setup, home: Path) -> None:
    if not list(importlib.metadata.distributions(name="skypilot")):
        pytest.skip("SkyPilot comes with the extra cloud")
    gcloud(default=CORE)
    (home / ".sky").mkdir()
    (home / ".sky" / "config.yaml").write_text("workspaces: {default: {gcp: {project_id: sky-project}}}\n")
    name = bucket_name(Login("google.com:my-proj", "J.Roe+g00gle_@example.com"))
    program = (
        "from sky.clouds import GCP; from sky.data.storage import GcsStore; "
        f"print(GCP.get_project_id(), GcsStore.validate_name({name!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=home, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [local_login().project, name] == ["sky-project", name]


# the bucket


@pytest.mark.parametrize(
    ("project", "account", "name"),
    [
        ("my-project", "jane.roe@example.com", "finetune-my-project-jane-roe"),
        ("my-project", "Jane.Roe+x@example.com", "finetune-my-project-jane-roe-x"),
        ("example.com:my-project", "jane@example.com", "finetune-example-com-my-project-jane"),
        ("p-123456", "_jane_@example.com", "finetune-p-123456-jane"),
        ("p-123456", "trainer@p-123456.iam.gserviceaccount.com", "finetune-p-123456-trainer"),
    ],
)
def test_the_bucket_is_named_after_project_and_user(project: str, account: str, name: str) -> None:
    assert bucket_name(Login(project, account)) == name


@example("google-project", "jane@example.com")
@example("p", "g00gler@example.com")
@example("p" * 30, "someone.with.a.very.long.name.indeed.and.more@example.com")
@example("p" * 45, "a-b@example.com")
@example("p", "日本@example.com")
@given(st.from_regex(r"[a-z][-a-z0-9.:]{4,70}[a-z0-9]", fullmatch=True), st.text(min_size=1))
def test_every_bucket_name_is_valid_and_always_the_same(project: str, account: str) -> None:
    name = bucket_name(Login(project, account))
    assert re.fullmatch(r"finetune-[-a-z0-9]{0,53}[a-z0-9]", name) and 3 <= len(name) <= 63
    assert not re.search("g[o0][o0]gle", name) and not name.startswith("goog")
    assert bucket_name(Login(project, account)) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("p" * 40, "someone.with.a.long.name.1@example.com"), ("p" * 40, "someone.with.a.long.name.2@example.com")),
        (("p-123456", "日本@example.com"), ("p-123456", "中国@example.com")),
        (("p-123456", "google@example.com"), ("p-123456", "g00gle@example.com")),
    ],
)
def test_truncated_and_replaced_names_of_two_users_stay_different(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert bucket_name(Login(*one)) != bucket_name(Login(*other))
