"""Google's APIs on this computer, for the real gcloud."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.json_server import JsonHandler, serving


@contextmanager
def google_for_gcloud(handler: type[JsonHandler], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed gcloud, logged in with a made-up token, asks `handler`. Skips the test where it is not installed."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    (folder / "token").write_text("made-up")
    for name in [name for name in os.environ if name.startswith("CLOUDSDK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(folder))
    monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN_FILE", str(folder / "token"))
    with serving(handler) as address:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", f"{address}/compute/v1/")
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", f"{address}/storage/v1/")
        yield
