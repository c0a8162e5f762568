"""Dollars and times as text."""

from __future__ import annotations


def usd_text(usd: float) -> str:
    """Dollars with two digits that say something, also for a thousandth of a cent. scatter.js of the runs page has the same."""
    return f"${usd:,.2f}" if usd >= 0.1 or not usd else f"${usd:.2g}" if usd >= 0.0001 else f"${usd:.1e}"


def hours_text(hours: float) -> str:
    return f"{hours:,.2f} h"


def duration(seconds: float) -> str:
    """As text: 5.9 h, 21.4 min, 36 s."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
