#!/usr/bin/env bash
# Scores a run of the bucket and writes its report there.
#
# Environment: RUN_NAME (empty: the run of this job, else the newest trained one), MAX_RUN_USD, MAX_HOURS.
# Exit codes: those of `finetune evaluate`; 2 when the limit was too low.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"

run_to_score() {
  local name
  name=$(run_name)
  if [ -z "${RUN_NAME:-}" ] && [ ! -d "$MOUNT/runs/$name" ]; then
    name=$(newest_trained)
    [ -n "$name" ] || fail "$MOUNT/runs: no run there is trained; train one first, or name it by --env RUN_NAME=NAME"
  fi
  [ -f "$MOUNT/runs/$name/config.yaml" ] ||
    fail "$MOUNT/runs/$name: no such run; there: $(cd "$MOUNT/runs" 2>/dev/null && echo */)"
  printf '%s\n' "$name"
}

newest_trained() {
  python -c '
import sys
from pathlib import Path
trained = sorted(Path(sys.argv[1]).glob("*/adapter/adapter_config.json"), key=lambda path: path.stat().st_mtime)
print(trained[-1].parents[1].name if trained else "")' "$MOUNT/runs"
}

require_bucket
name=$(run_to_score)
run="$MOUNT/runs/$name"
say "scoring $run"
data=$(record_value "$run" data manifest_sha256)
fetch_data "$data" "$run/config.yaml"
hours=$(limit_hours)
run_limited "$hours" finetune evaluate "$run"
[ "$code" -ne 124 ] ||
  fail "not scored in $hours hours (MAX_HOURS=$MAX_HOURS, MAX_RUN_USD=$MAX_RUN_USD); launch again with a higher limit"
[ "$code" -eq 0 ] || exit "$code"
finetune report "$run"
say "the report is in the bucket: gcloud storage cp gs://${BUCKET:-BUCKET}/runs/$name/report.html ."
