#!/usr/bin/env bash
# Scores a run in the bucket and writes its report there.
#
# Environment: RUN_NAME (empty: the run of this job, else the newest trained one), MAX_RUN_USD, MAX_HOURS.
# Exit codes: those of `finetune evaluate`; 2 if the limit was too low.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job evaluate
