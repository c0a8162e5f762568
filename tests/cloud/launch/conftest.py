"""The real SkyPilot with our policy, for a user who is logged in as far as that goes without Google."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.catalog_fixture import G4, lay_out_catalog
from tests.helpers.machine_fixture import ROOT
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    """With the prices of the shared slice of the catalog, and G4 machines."""
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home)
    lay_out_catalog(home, more=G4)
    with SkyWorker(env, ROOT) as running:
        yield running
