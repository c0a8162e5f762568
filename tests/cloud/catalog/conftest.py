"""A home folder of its own for each test, and a price catalog of given lines in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cloud.catalog.offers import Catalog, load_catalog
from tests.helpers.catalog_fixture import write_prices


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    return tmp_path


@pytest.fixture
def made(home: Path) -> Callable[..., Catalog]:
    """A catalog with the given lines."""

    def make(*lines: str) -> Catalog:
        write_prices(home, list(lines))
        return load_catalog(allow_snapshot=False)

    return make
