# shellcheck shell=bash
# What the scripts share that run on a rented machine; each begins with: . "$(dirname "$0")/common.sh"
#
# ~/finetune-env              the environment, made by on_machine/setup.sh
# /bucket/runs/<run>          run folders: they outlive the machine
# /bucket/data/<set>-<id>     prepared sets; <id> begins the SHA-256 of manifest.json, so such a folder never changes
# /bucket/data/by-config/<h>  which of them was last used for a config whose data section has the hash <h>
set -euo pipefail
shopt -s inherit_errexit  # a failure inside $(...) counts too
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly MOUNT="${FINETUNE_MOUNT:-/bucket}" STATE="$HOME/.finetune"
export PATH="$HOME/finetune-env/bin:$PATH"
: "${MAX_RUN_USD:=25}" "${MAX_HOURS:=24}" "${GRACE_SECONDS:=180}"
for secret in WANDB_API_KEY HF_TOKEN; do  # our task YAMLs give "" where the user has none
  [ -n "${!secret:-}" ] || unset "$secret"
done
(umask 077 && mkdir -p "$STATE")

say() { printf 'machine: %s\n' "$*" >&2; }

fail() {  # the user's mistake: a managed job does not retry it
  say "$*"
  exit 2
}

require_bucket() {
  [ -d "$MOUNT" ] && [ -w "$MOUNT" ] || fail "$MOUNT: no bucket is mounted there; launch with a task of sky/"
}

cluster_name() {
  python -c 'import json, os; print(json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO") or "{}").get("cluster_name") or "CLUSTER")'
}

# Run names: RUN_NAME, or SKYPILOT_TASK_ID, which stays the same when a managed job is recovered on another machine. Only
# characters that a folder, a bucket and W&B's run ids (at most 128, none of /\#?%:) all take.
run_name() {
  local name="${RUN_NAME:-}"
  if [ -z "$name" ]; then
    name="${SKYPILOT_TASK_ID:-}"
    [ -n "$name" ] || fail "RUN_NAME: empty, and no SKYPILOT_TASK_ID to name the run after"
    name="${name//[^A-Za-z0-9_-]/-}"
    name="${name:0:100}"
  elif [[ ! $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]]; then
    fail "RUN_NAME: expected at most 100 of A-Z a-z 0-9 . _ - with a letter or digit first, found '$name'"
  fi
  printf '%s\n' "$name"
}

record_value() {  # RUN KEY...: a value of its run.json, "" where there is none
  python -c '
import json, sys
value = json.load(open(sys.argv[1], encoding="utf-8"))
for key in sys.argv[2:]:
    value = (value or {}).get(key)
print(value or "")' "$1/run.json" "${@:2}" 2>/dev/null || fail "$1/run.json: missing or not readable"
}

config_data() {  # CONFIG [KEY=VALUE...]: the folder of its prepared set, a tab, a hash of its data section
  local resolved
  resolved=$(finetune config "$@")
  python -c '
import hashlib, json, sys, yaml
data = yaml.safe_load(sys.stdin)["data"]
print(data["output_dir"], hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12], sep="\t")' <<<"$resolved"
}

set_id() {  # FOLDER: the id of the prepared set in it, "" if there is none
  [ ! -f "$1/manifest.json" ] || sha256sum "$1/manifest.json" | cut -c 1-12
}

copy_set() {  # FROM TO: the manifest last, so that half a copy does not count
  local entry
  rm -rf -- "$2/manifest.json" "$2/databases"
  mkdir -p "$2"
  for entry in "$1"/*; do
    [ "${entry##*/}" = manifest.json ] || cp -R "$entry" "$2/"
  done
  cp "$1/manifest.json" "$2/.manifest.part"
  mv "$2/.manifest.part" "$2/manifest.json"
}

# fetch_data WANTED CONFIG [KEY=VALUE...]: lays the prepared set of a config on the local disk, and keeps a copy in the bucket.
# WANTED is the SHA-256 of the manifest that an earlier attempt used, "" for a new run. Looked for in this order: what came
# with the working directory, the bucket, the sources. What an earlier job laid here for another config (~/.finetune/set-<id>
# says for which) did not come with the working directory.
fetch_data() {
  local wanted="${1:0:12}" described folder made sets="$MOUNT/data" id
  shift
  described=$(config_data "$@")
  IFS=$'\t' read -r folder made <<<"$described"
  id=$(set_id "$folder")
  if [ -z "$wanted" ] && [ "$(cat "$STATE/set-$id" 2>/dev/null || printf '%s' "$made")" != "$made" ]; then
    id=""
  fi
  if [ -z "$id" ] || [ "$id" != "${wanted:-$id}" ]; then
    id="${wanted:-$(cat "$sets/by-config/$made" 2>/dev/null || true)}"
    if [ -n "$id" ] && [ -f "$sets/${folder##*/}-$id/manifest.json" ]; then
      say "data: $sets/${folder##*/}-$id -> $folder"
      copy_set "$sets/${folder##*/}-$id" "$folder"
      printf '%s' "$made" >"$STATE/set-$id"
      return
    fi
    prepare_data "$@"
    id=$(set_id "$folder")
    printf '%s' "$made" >"$STATE/set-$id"
  fi
  if [ ! -f "$sets/${folder##*/}-$id/manifest.json" ]; then
    say "data: $folder -> $sets/${folder##*/}-$id"
    copy_set "$folder" "$sets/${folder##*/}-$id"
  fi
  mkdir -p "$sets/by-config"
  printf '%s\n' "$id" >"$sets/by-config/$made"
}

prepare_data() {  # CONFIG [KEY=VALUE...]
  say "data: prepared neither here nor in the bucket; preparing it on this machine, which costs its time"
  if grep -qs 'data/built/' "$1" && [ ! -e data/built/train.jsonl ]; then
    python data/build.py
  fi
  finetune data prepare "$@"
}

start_tensorboard() {
  tensorboard --logdir "$MOUNT/runs" --host 127.0.0.1 --port 6006 --reload_interval 60 \
    >"$STATE/tensorboard.log" 2>&1 &
  # shellcheck disable=SC2064  # this process, not a later one
  trap "kill $! 2>/dev/null || true" EXIT
  say "TensorBoard: ssh -L 6006:localhost:6006 $(cluster_name), then http://localhost:6006"
}

positive() {  # NAME: fails unless the variable holds a number above 0
  [[ ${!1} =~ ^[0-9]+(\.[0-9]+)?$ ]] && [[ ${!1} =~ [1-9] ]] || fail "$1: expected a number above 0, found '${!1}'"
}

limit_hours() {  # hours that MAX_RUN_USD and MAX_HOURS leave to this machine, from now
  local hours
  positive MAX_RUN_USD
  positive MAX_HOURS
  hours=$(finetune machine --wall-hours --max-run-usd "$MAX_RUN_USD" --max-hours "$MAX_HOURS") || hours=""
  if [[ ! $hours =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    say "the price of this machine is not known: MAX_HOURS=$MAX_HOURS alone limits its time"
    hours=$MAX_HOURS
  fi
  [[ $hours =~ [1-9] ]] || fail "MAX_RUN_USD=$MAX_RUN_USD is used up by the hours that this machine has run; raise it with --env"
  printf '%s\n' "$hours"
}

# run_limited HOURS COMMAND...: sets `code` to the command's exit code, to 124 when its time was up, to 2 when the disk was nearly
# full (on_machine/room.sh). Then, and when we get SIGTERM, the command gets SIGTERM and has GRACE_SECONDS to save its work. It
# gets it once, because a second one means: at once (without --foreground `timeout` sends two), and it alone, because it still
# needs the processes that it has started.
run_limited() {
  local hours="$1" begun=$SECONDS limit child
  shift
  limit=$(awk -v hours="$hours" 'BEGIN { printf "%d", hours * 3600 }')
  timeout --foreground --signal=TERM --kill-after="$GRACE_SECONDS" "${hours}h" "$@" &
  child=$!
  rm -f "$STATE/room.full"
  (setsid bash on_machine/room.sh "$child" "$STATE/room" </dev/null >/dev/null 2>&1 &)  # outlives us where SkyPilot ends us
  trap 'trap : TERM INT; kill -TERM "$child" 2>/dev/null || true' TERM INT
  while :; do  # `wait` also ends when a signal arrives; asked again, it still knows how the command ended
    wait "$child" || true
    kill -0 "$child" 2>/dev/null || break
  done
  code=0
  wait "$child" || code=$?
  trap - TERM INT
  if [ "$code" -eq 137 ] && [ $((SECONDS - begun)) -ge "$limit" ]; then  # it had to be killed
    code=124
  fi
  if [ "$code" -ne 0 ] && [ -e "$STATE/room.full" ]; then
    say "the disk was nearly full ($(cat "$STATE/room.full") MiB left): stopped, what was saved is kept; launch again with a larger" \
      "resources.disk_size, or free some room, and the same --env RUN_NAME"
    code=2  # it would fill on another machine, too
  fi
}
