"""The price catalog for a launch: the one with which SkyPilot will choose. Part of the launch policy."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from typing import Any

from finetune.cloud.catalog.offers import REFRESH_HOURS, Catalog, load_catalog, refresh_catalog
from finetune.errors import UserError

REFRESH_SECONDS = 10.0
"""SkyPilot fetches an old catalog before it chooses a machine, and waits without a time limit. Fetching it here first ensures
that SkyPilot chooses with the prices that were checked here."""
WARN_HOURS = 48.0


def catalog_for_launch(say: Any) -> Catalog:
    """SkyPilot's catalog on this disk, never our snapshot. A missing catalog is fetched; one older than REFRESH_HOURS is
    refreshed, and kept if that fails, as without network.

    say: prints a line for the user. Raises UserError if there is no catalog, and if SkyPilot is still fetching after
    REFRESH_SECONDS: it would choose with prices that were not checked against the ceiling.
    """
    try:
        catalog = load_catalog(allow_snapshot=False)
    except UserError:
        refresh_catalog()
        return load_catalog(allow_snapshot=False)
    if _age_hours(catalog) > REFRESH_HOURS:
        if not _refreshed(REFRESH_HOURS):
            raise UserError(
                f"{catalog.source}: SkyPilot has been fetching current prices for {REFRESH_SECONDS:g} s; check the network, "
                f"launch again, or run `sky gpus list --cloud gcp` first",
                code="catalog.not_fetched",
            )
        catalog = load_catalog(allow_snapshot=False)
    if _age_hours(catalog) > WARN_HOURS:
        say(
            f"finetune: WARNING: prices may have changed: {catalog.source}; `sky gpus list --cloud gcp` fetches current ones"
        )
    return catalog


def newest_catalog(say: Any) -> Catalog:
    """For placing a machine of a job that was launched before: like `catalog_for_launch`, but a catalog that is younger than
    REFRESH_HOURS is fetched again, too, unless that takes longer than REFRESH_SECONDS. A price may have risen meanwhile, and a
    machine that has stopped because of it must not be placed there again."""
    _refreshed(0)
    return catalog_for_launch(say)


def _refreshed(hours: int) -> bool:
    """Lets SkyPilot fetch a catalog that is older; whether that has ended, well or not, within REFRESH_SECONDS."""
    fetching = threading.Thread(target=_try_refresh, args=(hours,), daemon=True)
    fetching.start()
    fetching.join(REFRESH_SECONDS)
    return not fetching.is_alive()


def _age_hours(catalog: Catalog) -> float:
    """0 for a catalog that was put there by hand: SkyPilot does not refresh it either."""
    return (datetime.now(UTC) - catalog.fetched).total_seconds() / 3600 if catalog.fetched else 0.0


def _try_refresh(hours: int) -> None:
    with contextlib.suppress(UserError):
        refresh_catalog(hours)
