"""Started by tests/cloud/launch/test_policy_more.py: is a cluster that exists taken under the policy? Reads JSON lines,
prints "yes", or why not.

Each line: machine (resources of the cluster), status, task. Nothing is launched.
"""

from __future__ import annotations

import json
import sys

import sky_worker
from sky import Dag, Resources, Task, backends, exceptions, global_user_state
from sky.utils.status_lib import ClusterStatus

sky_worker.enable_gcp()
for number, line in enumerate(sys.stdin):
    asked, name = json.loads(line), f"c{number}"
    (machine,) = Resources.from_yaml_config(asked["machine"])
    handle = backends.CloudVmRayResourceHandle(
        cluster_name=name, cluster_name_on_cloud=name, cluster_yaml=None, launched_nodes=1, launched_resources=machine
    )
    global_user_state.add_or_update_cluster(name, handle, requested_resources={machine}, ready=True)
    global_user_state.set_cluster_status(name, ClusterStatus[asked["status"]])
    dag = Dag()
    dag.add(Task.from_yaml_config(asked["task"]))
    try:
        dag = sky_worker.as_sent(dag, {"policy": "finetune.cloud.launch.policy.CostPolicy", "op": "launch"}, name)
        backends.CloudVmRayBackend().check_resources_fit_cluster(handle, dag.tasks[0])
        print("result: yes")
    except exceptions.ResourcesMismatchError:
        print("result: another machine")
    except exceptions.UserRequestRejectedByPolicy as refusal:
        print(f"result: {refusal}".replace("\n", " "))
