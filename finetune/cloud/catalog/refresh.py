"""The price catalog that a launch is decided on: the one by which SkyPilot will choose. Part of the launch policy."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from typing import Any

from finetune.cloud.catalog.offers import REFRESH_HOURS, Catalog, load_catalog, refresh_catalog
from finetune.errors import UserError

REFRESH_SECONDS = 10.0
"""SkyPilot fetches an old catalog before it chooses, and waits for it without a limit. What is waited for here it need not
fetch again, and the prices here are then those by which it chooses."""
WARN_HOURS = 48.0


def catalog_for_launch(say: Any) -> Catalog:
    """SkyPilot's catalog as it lies on this disk. Where it is missing SkyPilot fetches it; where it is older than SkyPilot
    likes, SkyPilot renews it, and the old one counts where that fails, as without network. Never our snapshot.

    say: prints a line for the user. Raises UserError where there is none, and where SkyPilot is still fetching after
    REFRESH_SECONDS: it would choose by prices that were never held against the ceiling.
    """
    try:
        catalog = load_catalog(allow_snapshot=False)
    except UserError:
        refresh_catalog()
        return load_catalog(allow_snapshot=False)
    if _age_hours(catalog) > REFRESH_HOURS:
        fetching = threading.Thread(target=_try_refresh, daemon=True)
        fetching.start()
        fetching.join(REFRESH_SECONDS)
        if fetching.is_alive():
            raise UserError(
                f"{catalog.source}: SkyPilot has been fetching today's prices for {REFRESH_SECONDS:g} s; look at the network, "
                f"launch again, or run `sky gpus list --cloud gcp` first",
                code="catalog.not_fetched",
            )
        catalog = load_catalog(allow_snapshot=False)
    if _age_hours(catalog) > WARN_HOURS:
        say(
            f"finetune: WARNING: prices may have changed: {catalog.source}; `sky gpus list --cloud gcp` fetches today's"
        )
    return catalog


def _age_hours(catalog: Catalog) -> float:
    """0 for a catalog that somebody put there by hand: SkyPilot leaves such a one alone too."""
    return (datetime.now(UTC) - catalog.fetched).total_seconds() / 3600 if catalog.fetched else 0.0


def _try_refresh() -> None:
    with contextlib.suppress(UserError):
        refresh_catalog()
