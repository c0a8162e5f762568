"""Looks at prices again on a machine: the newest catalog is fetched, and the launch's price table is priced by it.

Spot prices may change once a day, and a managed job is placed days after its launch. The rules are those of the launch: host +
GPU + disk in the zone, no price that is an anomaly unless the launch trusts them. The table at newer prices is kept in the home
folder, where machine/price.py prefers it to the launch's; a price that is not believed stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.cloud.catalog.csv_file import PriceRows
from finetune.cloud.catalog.fetch import fetch_prices
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.errors import UserError, first_line
from finetune.machine.price import NEWEST, launch_table, machine_price, newest_table
from finetune.runtime.files import write_json

MOST_CHANGE = 10.0
"""A price that has changed by more than this factor since the launch is damage, not news: Google's spot prices are 60 to 91%
below the on-demand price (cloud.google.com/compute/docs/instances/spot), so they can hardly move by more than a factor of 5."""
KEPT = "; kept, because "
Table = dict[str, Any]


def look(say: Callable[[str], None], fetch: Callable[[], PriceRows] = fetch_prices) -> None:
    """Fetches the newest prices and keeps the launch's table at them, unless that fails; says the outcome in one line. Never
    raises, and takes little longer than `fetch`. Does nothing on a machine that no launch of ours has started."""
    try:
        found = launch_table()
        if found is None:
            return
        table, launch = found
        if not table.get("kinds"):  # of a launch by an earlier version
            return
        rows = fetch()
        newest = priced_again(table, newest_table(launch) or table, rows, datetime.now(UTC))
        write_json(Path.home() / NEWEST, {"launch": launch, "table": newest})
        price = machine_price()
    except UserError as error:
        say(f"prices: {error}")
    except Exception as error:  # the run goes on, at the prices that it knows
        say(
            f"prices: not looked at again ({type(error).__name__}: {first_line(error)}); the prices of the launch count"
        )
    else:
        if price is not None:
            say(f"prices: this machine costs ${price.usd_per_hour:g}/h ({price.basis})")


def priced_again(launch: Table, known: Table, rows: PriceRows, now: datetime) -> Table:
    """The table `known` (the launch's, or an earlier result of this) at the prices of `rows`.

    An offer above its ceiling gets `too_dear`, as text; one without a price that can be believed keeps the known one, and says
    why. Raises UserError where `rows` price less than half of the offers: then they are not whole, or of another kind.
    """
    basis = f"SkyPilot's catalog, fetched on this machine {now:%Y-%m-%d %H:%M} UTC"
    catalog = Catalog(basis, is_snapshot=False, fetched=now, rows=rows, clouds={})
    offers, without = list[Table](), list[str]()
    found: dict[tuple[int, str, int, bool], dict[str, Offer] | str] = {}
    for before, offer in zip(launch["offers"], known["offers"], strict=True):
        key = (before["kind"], before["gpu"], before["count"], before["spot"])
        if key not in found:
            found[key] = _offers(catalog, launch["kinds"][before["kind"]], *key[1:])
        new, why = _offer(found[key], before, launch)
        if new is None:
            without.append(why)
            known_basis = str(offer.get("basis") or launch["basis"]).partition(KEPT)[0]
            offers.append({**offer, "basis": f"{known_basis}{KEPT}{why}"})
        else:
            offers.append(_priced(before, launch["kinds"][before["kind"]], new, basis))
    if 2 * len(without) > len(offers):
        raise UserError(
            f"{basis}: no price that can be believed for {len(without)} of the {len(offers)} offers of the launch "
            f"({without[0]}); the prices of the launch count",
            code="catalog.implausible",
        )
    return {**launch, "offers": offers}


def _offers(catalog: Catalog, kind: Table, gpu: str, count: int, spot: bool) -> dict[str, Offer] | str:
    """By zone; why there are none as text."""
    try:
        found = catalog.offers(
            gpu, machine=kind["machine"], count=count, spot=spot, disk_gib=kind["disk_gib"], disk_tier=kind["disk_tier"]
        )
    except UserError as error:
        return str(error)
    return {offer.zone: offer for offer in found}


def _offer(found: dict[str, Offer] | str, before: Table, launch: Table) -> tuple[Offer | None, str]:
    """The offer of a zone, or why its price is not believed."""
    if isinstance(found, str):
        return None, found
    offer = found.get(before["zone"])
    if offer is None:
        return None, "the newest catalog has no price for it"
    if offer.anomalies and not launch.get("trust_prices"):
        return None, f"the newest is an anomaly: {offer.anomalies[0]}"
    usd = offer.usd_per_hour * launch["kinds"][before["kind"]]["nodes"]
    if not 1 / MOST_CHANGE <= usd / before["usd_per_hour"] <= MOST_CHANGE:
        return None, f"the newest, ${usd:g}/h, is too far from the launch's ${before['usd_per_hour']:g}/h"
    return offer, ""


def _priced(before: Table, kind: Table, offer: Offer, basis: str) -> Table:
    usd = round(offer.usd_per_hour * kind["nodes"], 5)
    launch = "" if usd == before["usd_per_hour"] else f"; ${before['usd_per_hour']:g}/h at the launch"
    priced = {**before, "usd_per_hour": usd, "basis": basis + launch}
    if kind["ceiling"] is not None and offer.usd_per_hour * kind["machines"] > kind["ceiling"]:
        several = f" for {kind['machines']} machines" if kind["machines"] > 1 else ""
        priced["too_dear"] = f"${kind['ceiling']:g}/h{several}"
    return priced
