#!/usr/bin/env bash
# JupyterLab and TensorBoard on a rented machine, for whoever comes in by ssh. Ends by itself when nothing has run for a while.
#
# Environment: MAX_RUN_USD, MAX_HOURS.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"
exec finetune job dev
