"""Why the hub does not give something: its refusals as the real one sends them, and a hub that is not there."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from finetune.runtime.hub_reason import hub_reason
from tests.helpers.json_server import JsonHandler, serving

pytest.importorskip("huggingface_hub")


def hub(status: int, code: str | None = None, *, at: str = "auth-check") -> type[JsonHandler]:
    """One that refuses requests whose path holds `at`. code: of the header by which the hub tells refusals apart."""

    class Hub(JsonHandler):
        def answer(self) -> tuple[int, Any]:
            return (status, {"error": "refused"}) if at in self.path else (200, {"id": "owner/name", "sha": "0" * 40})

        def end_headers(self) -> None:
            if code and at in self.path:
                self.send_header("X-Error-Code", code)
            super().end_headers()

    return Hub


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda url: monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)


@pytest.mark.parametrize(
    ("status", "code", "at", "why", "advice"),
    [
        (403, "GatedRepo", "auth-check", "it is gated", "HF_TOKEN"),
        (401, "RepoNotFound", "auth-check", "no such dataset there, or a private one", "HF_TOKEN"),
        (404, "RepoNotFound", "auth-check", "no such dataset there, or a private one", "check the id"),
        (404, "RevisionNotFound", "/revision/", "it has no such revision", "a commit that its page lists"),
        (418, None, "auth-check", "it answers 418", "folder of a copy"),
    ],
)
def test_each_refusal_has_its_reason(
    endpoint: Any, status: int, code: str | None, at: str, why: str, advice: str
) -> None:
    with serving(hub(status, code, at=at)) as url:
        endpoint(url)
        found = hub_reason("owner/name", "0" * 40, "dataset")
    assert found is not None and found[0] == why and advice in found[1]
    if code == "GatedRepo":
        assert f"{url}/datasets/owner/name" in found[1]


def test_a_hub_that_has_it_is_not_the_reason(endpoint: Any) -> None:
    with serving(hub(404, at="nowhere")) as url:
        endpoint(url)
        assert hub_reason("owner/name", "0" * 40, "model") is None


def test_no_connection(endpoint: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        endpoint(url)
        found = hub_reason("owner/name", "0" * 40, "model")
    assert found is not None and found[0].startswith(f"no connection to {url}: ") and "refused" in found[0]


def test_the_password_of_a_hub_of_ones_own_is_not_shown(endpoint: Any) -> None:
    endpoint("http://me:geheim@127.0.0.1:9")
    found = hub_reason("owner/name", "0" * 40, "model")
    assert found is not None and found[0].startswith("no connection to http://***@127.0.0.1:9: ")
    with serving(hub(403, "GatedRepo")) as url:
        endpoint(url.replace("://", "://me:geheim@"))
        found = hub_reason("owner/name", "0" * 40, "model")
    assert found is not None and found[0] == "it is gated" and "geheim" not in found[1]


def test_a_hub_that_is_switched_off(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = hub_reason("owner/name", "0" * 40, "model")
    assert found is not None and found[0] == "HF_HUB_OFFLINE is set"
