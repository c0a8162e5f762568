#!/usr/bin/env bash
# JupyterLab and TensorBoard on a rented machine, for whoever comes in by ssh: both listen on 127.0.0.1 alone, and Jupyter
# wants its token, which stays out of SkyPilot's log.
#
# Environment: MAX_RUN_USD, MAX_HOURS. Ends by itself when nothing has run for IDLE_SECONDS, so that autostop can do its work.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"

readonly IDLE_SECONDS=1800
require_bucket
hours=$(limit_hours)
start_tensorboard
cluster=$(cluster_name)
say "JupyterLab for at most $hours hours, or until it is idle for $((IDLE_SECONDS / 60)) minutes:"
say "  ssh -L 8888:localhost:8888 -L 6006:localhost:6006 $cluster"
say "  ssh $cluster finetune-env/bin/jupyter server list      # the address with its token"
say "  what is to outlive the machine belongs into the folder notebooks, which lies in the bucket"
mkdir -p "$MOUNT/notebooks"
ln -sfn "$MOUNT/notebooks" notebooks
umask 077
run_limited "$hours" jupyter lab --no-browser --ip=127.0.0.1 --port=8888 --ServerApp.port_retries=0 \
  --ServerApp.shutdown_no_activity_timeout="$IDLE_SECONDS" --MappingKernelManager.cull_idle_timeout="$IDLE_SECONDS" \
  --MappingKernelManager.cull_connected=True --TerminalManager.cull_inactive_timeout="$IDLE_SECONDS" \
  >"$STATE/jupyter.log" 2>&1
[ "$code" -eq 0 ] || [ "$code" -eq 124 ] || { tail -n 5 "$STATE/jupyter.log" >&2; exit "$code"; }
