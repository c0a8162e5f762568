"""Started by tests/cloud/launch/test_policy_more.py: the policy while SkyPilot's price server takes its time.
Arguments: URL of that server.

Prints whether every zone that is handed over is still below the ceiling by the catalog that lies there afterwards.
"""

from __future__ import annotations

import sys

import sky
from sky import exceptions, skypilot_config
from sky.server.requests.request_names import AdminPolicyRequestName
from sky.skylet import constants

from finetune.cloud.catalog.offers import load_catalog
from finetune.cloud.launch.policy import CostPolicy

constants.HOSTED_CATALOG_DIR_URL = sys.argv[1]
CEILING = 1.0
machine = {"infra": "gcp", "accelerators": "T4:1", "instance_type": "n1-highmem-8", "max_hourly_cost": CEILING}
task = sky.Task.from_yaml_config({"run": "true", "resources": machine, "envs": {"MAX_RUN_USD": "5"}})
options = sky.admin_policy.RequestOptions(cluster_name=None, idle_minutes_to_autostop=None, down=False, dryrun=True)
request = sky.UserRequest(task, skypilot_config.to_dict(), AdminPolicyRequestName.CLUSTER_LAUNCH, options, True)
try:
    CostPolicy.validate_and_mutate(request)
except exceptions.UserRequestRejectedByPolicy as refusal:
    print(f"result: refused: {refusal}")
    sys.exit()
now = load_catalog().offers("T4", machine="n1-highmem-8", spot=False, disk_gib=256)
handed = {(one.region, one.zone) for one in task.resources}
above = [o.zone for o in now if {(o.region, o.zone), (o.region, None)} & handed and o.usd_per_hour > CEILING]
print(f"result: {len(handed)} handed over, above the ceiling: {above}")
