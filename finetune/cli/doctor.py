"""`finetune doctor`: checks this machine, the account, its quotas and the bucket."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from finetune.cli.arguments import add_command, add_json
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_doctor
from finetune.stage_end.tell import cost_of_command, tell


def add(commands: Any) -> None:
    doctor = add_command(commands, "doctor", _doctor, "check this machine, accounts and packages", "finetune doctor")
    doctor.add_argument(
        "--cloud",
        action="store_true",
        help="check what launching on Google Cloud needs, instead of what training here needs",
    )
    doctor.add_argument(
        "--fix-policy",
        action="store_true",
        help="write the launch policy into SkyPilot's config, so that the ceilings hold for `sky launch` in every folder",
    )
    add_json(doctor, "the rows")


def _doctor(arguments: argparse.Namespace) -> int:
    from finetune.doctor.local import examine, exit_code, render

    if arguments.fix_policy:
        if arguments.json:
            raise UserError("--fix-policy: prints no table; omit --json", code="cli.conflicting_options")
        from finetune.cloud.gcloud.policy_setting import KEY, POLICY, name_policy

        print(f"{name_policy()}: {KEY}: {POLICY}")
        tell("doctor", cost_of_command(), after_doctor(cloud=True, missing=True))
        return EXIT_OK
    checks = examine("cloud", regions=_regions()) if arguments.cloud else examine("train")
    code = exit_code(checks)
    if arguments.json:
        print_document({"ok": code == EXIT_OK, "rows": [asdict(check) for check in checks]})
    else:
        print(render(checks))
    tell("doctor", cost_of_command(), after_doctor(cloud=arguments.cloud, missing=code != EXIT_OK))
    return code


def _regions() -> list[str] | None:
    """The regions whose quota is checked; None (all of them) if the price catalog cannot be read."""
    from finetune.cloud.catalog.offers import load_catalog
    from finetune.cloud.plan.plan import regions_for_plan
    from finetune.config.schema import PlanSection

    try:
        return regions_for_plan(load_catalog(), PlanSection())
    except UserError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return None
