#!/usr/bin/env bash
# Serves a run or an export of the bucket at http://localhost:8000/v1, reachable through ssh. Ends after a time without requests.
#
# Environment: RUN_NAME or EXPORT, DATABASES, EXECUTE, IDLE_MINUTES, MAX_USD_PER_DAY, MAX_RUN_USD, MAX_HOURS, FINETUNE_API_KEY.
# Exit codes: 0 idle, or stopped at a limit; 2 user error; 75 the model's process has died.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job serve
