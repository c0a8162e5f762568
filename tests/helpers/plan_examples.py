"""Configs and price lists for the tests of `finetune plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.cloud.catalog.csv_file import read_prices
from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.plan.plan import Plan, Row, plan_run
from finetune.config.load import from_dict
from finetune.config.schema import RunConfig
from finetune.machine.gpus import MACHINES
from finetune.machine.price import Ceilings
from tests.helpers.catalog_fixture import gpu, host, write_prices

HOST_USD, HOST_SPOT_USD = 0.10, 0.05
ALL = {"A100": (3.0, 1.0), "L4": (0.7, 0.25), "T4": (0.4, 0.15), "V100": (2.5, 0.9)}
"""Plausible prices in US dollars an hour, on-demand and spot, of a GPU without its host."""


def run_values(**sections: dict[str, Any]) -> dict[str, Any]:
    """A config of Mistral-7B on 4,000 examples of 300 tokens, not prepared, as a dict."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "mistralai/Mistral-7B-v0.1", "revision": "main"},
        "data": {
            "sources": [{"kind": "spider", "path": "no/such", "files": ["train.json"]}],
            "output_dir": "no/such/folder",
            "val_fraction": 0.0,
            "test_fraction": 0.0,
        },
        "training": {"num_train_epochs": 1, "eval_steps": 0},
        "plan": {"records": 4000, "mean_tokens": 300.0, "gpus": list(ALL)},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return values


def run_config(**sections: dict[str, Any]) -> RunConfig:
    return from_dict(run_values(**sections), "a test")


def machine(name: str, zone: str, usd: object, spot: object) -> list[str]:
    """Two lines of a price list: a GPU and its host in one zone."""
    return [host_of(name, zone), gpu(zone, usd, spot, name)]


def host_of(name: str, zone: str) -> str:
    """The line of the machine that a GPU comes with."""
    machine = MACHINES[name].machine
    line = host(zone, HOST_USD, HOST_SPOT_USD, machine)
    return line.replace("12.0,85.0", "8.0,52.0") if machine == "n1-highmem-8" else line


def catalog_of(folder: Path, lines: list[str]) -> Catalog:
    """The prices of these lines, read from a file as SkyPilot lays it out under `folder`."""
    rows, fetched = read_prices(write_prices(folder, lines).parents[1])
    return Catalog("a test's catalog", False, fetched, rows, {})


def priced(folder: Path, zone: str = "us-central1-a", /, **gpus: tuple[object, object]) -> Catalog:
    """One zone that sells these GPUs at (on-demand, spot) US dollars an hour without host: priced(folder, T4=(0.4, 0.1))."""
    return catalog_of(folder, [line for name, prices in gpus.items() for line in machine(name, zone, *prices)])


def plan_of(config: RunConfig, catalog: Catalog, ceilings: Ceilings | None = None, **settings: Any) -> Plan:
    return plan_run(config, catalog, ceilings or Ceilings(), **settings)


def row_of(plan: Plan, name: str, *, spot: bool) -> Row:
    [row] = [row for row in plan.rows if row.on_gpu.gpu.name == name and row.spot == spot]
    return row


def names(plan: Plan) -> list[str]:
    return [f"{row.on_gpu.gpu.name} {'spot' if row.spot else 'on-demand'}" for row in plan.rows if row.chosen]


def write_manifest(folder: Path, **changes: Any) -> Path:
    """A prepared folder's manifest.json, with the keys that the plan reads: 1,000 examples of 120 tokens, 50 to
    validate."""
    values: dict[str, Any] = {
        "counts": {"read": 1100, "train": 1000, "val": 50, "test": 50},
        "tokens": {"train": {"total": 120_000, "completion": 20_000}, "val": {"total": 6000}, "test": {"total": 6000}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    path.write_text(json.dumps(values | changes), encoding="utf-8")
    return path


REGIONS = ("us-central1", "us-east1", "us-west1", "europe-west4")


def with_a_wrong_price(folder: Path) -> Catalog:
    """L4 at $0.70 in three regions and at $0.20 in one; a T4 whose only zone charges more for spot than on demand."""
    lines = [
        line for region in REGIONS for line in machine("L4", f"{region}-a", 0.2 if region == "us-east1" else 0.7, 0.15)
    ]
    return catalog_of(folder, [*lines, host_of("T4", "us-central1-a"), gpu("us-central1-a", 0.4, 0.5, "T4")])  # fmt: skip
