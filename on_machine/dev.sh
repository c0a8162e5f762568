#!/usr/bin/env bash
# JupyterLab and TensorBoard on a cloud machine, reachable through ssh. Ends after a time without activity.
#
# Environment: MAX_RUN_USD, MAX_HOURS.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job dev
