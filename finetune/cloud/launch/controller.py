"""The controller of a managed job, which places it again after a preemption: its price, and the settings that it goes by."""

from __future__ import annotations

from typing import Any

from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.gcloud.config import skypilot_setting

CONTROLLER = ("n2-standard-4", 50)
"""Machine and disk (GB) that SkyPilot 0.14 takes for its jobs controller unless jobs.controller.resources says otherwise."""
CONSOLIDATED = ("jobs", "controller", "consolidation_mode")
WORKSPACE, POLICY = "active_workspace", "admin_policy"
"""Keys of SkyPilot's settings that do not count in a comparison: it fills in the first, and leaves the second out of a copy."""


def settings_to_copy(request: Any) -> Any:
    """The settings that SkyPilot copies for the controller of a managed job, of a sky.UserRequest.

    SkyPilot 0.14 leaves the admin policy out of that copy, so nothing would compare prices when the job is placed again. If the
    controller runs in the API server and the copy would say what that server's own settings say, there is none: then the server's
    settings hold, which name this policy. Otherwise all of them, as they are.
    """
    settings = request.skypilot_config
    launched_here = request.request_name.value == "jobs.launch" and not request.at_client_side
    if not (launched_here and settings.get_nested(CONSOLIDATED, False)):
        return settings
    return type(settings)() if _without(skypilot_setting()) == _without(settings) else settings


def _without(settings: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(settings or {}).items() if key not in (WORKSPACE, POLICY)}


def warn_of_controller(request: Any, catalog: Catalog, say: Any) -> None:
    """A managed job needs a controller: a separate machine, unless it runs in the API server."""
    settings = request.skypilot_config
    if settings.get_nested(CONSOLIDATED, False):
        return
    machine, disk = CONTROLLER
    host = catalog.cpu_machine_usd(machine)
    if settings.get_nested(("jobs", "controller", "resources"), None):
        what = "as set in jobs.controller.resources, at its price"
    elif host is None:
        what = f"{machine}, which has no price in the catalog"
    else:
        what = f"{machine}, from ${host + disk_usd_per_hour(disk, 'medium', ''):.3f}/h (catalog, its cheapest region)"
    say(
        f"finetune: WARNING: a managed job starts a controller machine unless one is already running: {what}; to run it "
        f"on this computer free of charge, put `jobs: {{controller: {{consolidation_mode: true}}}}` into ~/.sky/config.yaml"
    )
