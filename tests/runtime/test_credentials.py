"""Keys are found where the services' own libraries look for them, and only their presence is reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runtime.credentials import (
    huggingface_home,
    huggingface_token_present,
    wandb_key_present,
    without_secrets,
)

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME",
    "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no environment variable with a key or its location."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_empty_home_has_no_keys() -> None:
    assert not huggingface_token_present()
    assert not wandb_key_present()


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize(("value", "present"), [("hf_x", True), ("", False), (" \n", False)])
def test_a_token_in_the_environment_counts_unless_it_is_blank(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, present: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert huggingface_token_present() is present


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        (None, "", ".cache/huggingface/token"),
        ("XDG_CACHE_HOME", "{home}/xdg", "xdg/huggingface/token"),
        ("HF_HOME", "{home}/hf", "hf/token"),
        ("HF_HOME", "~/hf", "hf/token"),
        ("HF_TOKEN_PATH", "{home}/keys/hf", "keys/hf"),
    ],
)
def test_the_token_file_is_where_huggingface_hub_itself_looks(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str, file: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, value.format(home=home))
    assert not huggingface_token_present()
    put(home / file, "hf_x")
    assert huggingface_token_present()
    program = "import huggingface_hub.constants as c; print(c.HF_TOKEN_PATH, c.HF_HOME)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(home / file), str(huggingface_home())]


def test_an_empty_token_file_is_no_token(home: Path) -> None:
    put(home / ".cache" / "huggingface" / "token", "")
    assert not huggingface_token_present()


def test_a_wandb_key_in_the_environment_counts_unless_it_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", " ")
    assert not wandb_key_present()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert wandb_key_present()


@pytest.mark.parametrize(
    ("url", "machine", "present"),
    [
        (None, "api.wandb.ai", True),
        (None, "example.com", False),
        ("https://wandb.example.com", "wandb.example.com", True),
        ("https://wandb.example.com/base/", "wandb.example.com", True),
        ("http://localhost:8080", "localhost:8080", True),
        ("https://wandb.example.com", "api.wandb.ai", False),
    ],
)
def test_a_wandb_key_counts_if_the_netrc_file_has_it_for_the_server_in_use(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str | None, machine: str, present: bool
) -> None:
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    put(home / ".netrc", f"machine {machine}\n  login user\n  password secret\n")
    assert wandb_key_present() is present


def test_another_netrc_file_can_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "~/keys/netrc")
    assert not wandb_key_present()
    put(home / "keys" / "netrc", "machine api.wandb.ai login user password secret\n")
    assert wandb_key_present()


@pytest.mark.parametrize("text", ["machine api.wandb.ai password\n  junk junk\n", "machine", "\x00\xff"])
def test_a_netrc_file_that_cannot_be_read_is_no_key(home: Path, text: str) -> None:
    put(home / ".netrc", text)
    assert not wandb_key_present()
    (home / ".netrc").unlink()
    (home / ".netrc").mkdir()
    assert not wandb_key_present()


def test_nothing_is_printed(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put(home / ".cache" / "huggingface" / "token", "hf_secret")
    put(home / ".netrc", "machine api.wandb.ai login user password netrc_secret\n")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    assert (huggingface_token_present(), wandb_key_present()) == (True, True)
    assert capfd.readouterr() == ("", "")
    assert os.environ["WANDB_API_KEY"] == "wandb_secret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "failed: http://me:pass@host:5000/api?x=1 (http://host)",
            "failed: http://***@host:5000/api?x=1 (http://host)",
        ),
        ("https://me:p%40@s:x@host/", "https://***@host/"),
        ("http://host/?write_token=abc&a=1", "http://host/?write_token=***&a=1"),
        ("Bearer token-of-mine", "Bearer ***"),
        ("https://host/user@example", "https://host/user@example"),
        ("nothing secret", "nothing secret"),
    ],
)
def test_text_without_secrets(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-mine")
    assert without_secrets(text) == shown
