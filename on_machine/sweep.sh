#!/usr/bin/env bash
# Works on a sweep in the bucket: trains its trials on this machine, one after the other, until none is left for it.
#
# Environment (sky/sweep.yaml sets it): CONFIG, OVERRIDES, SWEEP, SWEEP_*, RUN_NAME, EVALUATE, MAX_RUN_USD, MAX_HOURS.
# Exit codes: 0 done, or stopped at a limit; 2 user error; 75 interrupted, to be run again.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job sweep
