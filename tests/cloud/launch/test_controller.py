"""Which settings SkyPilot copies for a job's controller: none where that keeps the launch policy in force there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cloud.launch.controller import settings_to_copy

OURS = "finetune.cloud.launch.policy.CostPolicy"
CONSOLIDATED: dict[str, Any] = {"jobs": {"controller": {"consolidation_mode": True}}}


class Settings(dict[str, Any]):
    """As SkyPilot's Config."""

    def get_nested(self, keys: tuple[str, ...], default: Any) -> Any:
        value: Any = self
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value


@dataclass
class Request:
    settings: dict[str, Any]
    name: str = "jobs.launch"
    at_client_side: bool = False
    skypilot_config: Settings = field(init=False)

    def __post_init__(self) -> None:
        self.skypilot_config = Settings(self.settings)

    @property
    def request_name(self) -> SimpleNamespace:
        return SimpleNamespace(value=self.name)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The API server's own settings, with the policy that `finetune doctor --fix-policy` writes."""
    monkeypatch.delenv("SKYPILOT_GLOBAL_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".sky" / "config.yaml"
    path.parent.mkdir()
    path.write_text(f"jobs:\n  controller:\n    consolidation_mode: true\nadmin_policy: {OURS}\n")
    return path


def test_a_controller_in_the_api_server_goes_by_that_servers_settings(server: Path) -> None:
    request = Request({**CONSOLIDATED, "admin_policy": OURS, "active_workspace": "default"})
    copied = settings_to_copy(request)
    assert copied == {} and isinstance(copied, Settings), "then SkyPilot makes no copy"


@pytest.mark.parametrize(
    "request_",
    [
        Request({**CONSOLIDATED, "gcp": {"project_id": "of-the-client"}}),
        Request({"jobs": {"controller": {"consolidation_mode": False}}}),
        Request({}),
        Request(CONSOLIDATED, name="launch"),
        Request(CONSOLIDATED, name="jobs.launch_cluster"),
        Request(CONSOLIDATED, at_client_side=True),
    ],
)
def test_settings_that_would_be_lost_are_copied(server: Path, request_: Request) -> None:
    assert settings_to_copy(request_) is request_.skypilot_config


def test_settings_of_the_server_that_the_request_does_not_have_count_too(server: Path) -> None:
    server.write_text(f"{server.read_text()}gcp:\n  project_id: of-the-server\n")
    request = Request(CONSOLIDATED)
    assert settings_to_copy(request) is request.skypilot_config
