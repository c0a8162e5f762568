#!/usr/bin/env bash
# Trains on a cloud machine: starts a run in the bucket, or resumes an interrupted one from its newest checkpoint.
#
# Environment (the task YAMLs of sky/ set it): CONFIG, OVERRIDES, RUN_NAME, MAX_RUN_USD, MAX_HOURS, SKYPILOT_TASK_ID. For a
# task with num_nodes, SkyPilot runs this on every node, and SKYPILOT_NODE_IPS, _NODE_RANK and _NUM_NODES identify it.
# Exit codes: 0 done, or stopped at a limit with a checkpoint; 2 user error; 75 interrupted, to be run again.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job train
