#!/usr/bin/env bash
# Trains on a rented machine, into the bucket: a run from its beginning, or one that was interrupted from its newest checkpoint.
#
# Environment (the task YAMLs of sky/ set it): CONFIG, OVERRIDES, RUN_NAME, MAX_RUN_USD, MAX_HOURS, SKYPILOT_TASK_ID. Where the
# task has num_nodes, SkyPilot runs this on every node, and SKYPILOT_NODE_IPS, _NODE_RANK and _NUM_NODES say which it is.
# Exit codes: 0 done, or stopped at a limit with a checkpoint kept; 2 the user's mistake; 75 interrupted, to be run again.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job train
