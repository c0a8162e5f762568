"""`finetune machine`: the price of this cloud machine."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, add_json, positive
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document


def add(commands: Any) -> None:
    machine = add_command(
        commands, "machine", _machine, "print what this cloud machine costs per hour", "finetune machine"
    )
    machine.add_argument("--max-run-usd", type=positive, metavar="USD", help="dollars that a run on it may cost")
    machine.add_argument("--max-hours", type=positive, metavar="HOURS", help="hours that the run may take at most")
    machine.add_argument(
        "--wall-hours", action="store_true", help="print only the hours from now that both ceilings allow"
    )
    add_json(machine, "it")


def _machine(arguments: argparse.Namespace) -> int:
    from finetune.machine.price import Ceilings, machine_price, this_machine, wall_hours

    price = machine_price()
    hours = wall_hours(price, Ceilings(arguments.max_run_usd, arguments.max_hours))
    if arguments.wall_hours:
        if hours is None:
            raise UserError(
                "--wall-hours: no ceiling given: add --max-hours, or --max-run-usd on a machine with a price",
                code="cli.missing_option",
            )
        if arguments.json:
            print_document({"hours_left": round(hours, 4)})
        else:
            print(f"{hours:.4f}")
        return EXIT_OK
    if price is None:
        raise UserError(
            "the price of this machine is unknown: it was not launched by SkyPilot with our policy (.sky.yaml)",
            code="price.unknown",
        )
    machine = this_machine()
    if arguments.json:
        facts = {"gpu": machine.gpu, "spot": machine.spot, "zone": machine.zone}
        print_document(facts | {"usd_per_hour": price.usd_per_hour, "basis": price.basis, "hours_left": hours})
        return EXIT_OK
    kind = {True: "spot", False: "on-demand", None: "spot or on-demand unknown"}[machine.spot]
    where = f"{machine.gpu or 'GPU unknown'}, {kind}, {machine.zone or 'zone unknown'}"
    print(f"{where}: ${price.usd_per_hour:.4f} an hour ({price.basis})")
    if hours is not None:
        print(f"may run for another {hours:.2f} h")
    return EXIT_OK
