#!/usr/bin/env bash
# Trains on a rented machine, into the bucket: a run from its beginning, or one that was interrupted from its newest checkpoint.
#
# Environment (the task YAMLs of sky/ set it): CONFIG, OVERRIDES, RUN_NAME, MAX_RUN_USD, MAX_HOURS, SKYPILOT_TASK_ID. Where the
# task has num_nodes, SkyPilot runs this on every node, and SKYPILOT_NODE_IPS, _NODE_RANK and _NUM_NODES say which it is.
# Exit codes: 0 done, or stopped at a limit with a checkpoint kept; 2 the user's mistake; 75 interrupted, to be run again.
# shellcheck source=on_machine/common.sh
. "$(dirname "$0")/common.sh"

remove_unbegun() {  # what is left of an attempt that was cut off between making its folder and its first record
  if [ -d "$run" ] && [ ! -e "$run/run.json" ]; then
    if find "$run" -mindepth 1 ! -name config.yaml ! -name '.*.tmp' | grep -q .; then
      fail "$run: holds files, but no run.json; choose another RUN_NAME"
    fi
    rm -rf -- "$run"
  fi
}

gpus() {  # how many GPUs this job may use
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
  fi
}

set_trainer() {  # sets `trainer`: what stands for `finetune train`. One process per GPU where there are several
  local count
  count=$(gpus)
  trainer=(finetune train)
  if [ "${SKYPILOT_NUM_NODES:-1}" -gt 1 ]; then
    trainer=(python -m finetune.runtime.torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK"
      --master-addr "$(head -n 1 <<<"$SKYPILOT_NODE_IPS")" --master-port 29500
      --nproc-per-node "$((count > 1 ? count : 1))" -m finetune train)
  elif [ "$count" -gt 1 ]; then
    trainer=(python -m finetune.runtime.torchrun --nproc-per-node "$count" -m finetune train)
  fi
}

prepare_start() {
  [ -n "${CONFIG:-}" ] || fail "CONFIG: expected a config file such as configs/mistral_7b_qlora.yaml"
  local overrides
  read -ra overrides <<<"${OVERRIDES:-}"
  command=("${trainer[@]}" "$CONFIG" "${overrides[@]}"
    "training.output_dir=$MOUNT/runs" "training.run_name=$name" "budget.max_run_usd=$MAX_RUN_USD")
  fetch_data "" "$CONFIG" "${overrides[@]}"
  say "new run $run; if it is interrupted, the same launch with --env RUN_NAME=$name goes on with it"
}

prepare_resume() {
  local data
  data=$(record_value "$run" data manifest_sha256)
  fetch_data "$data" "$run/config.yaml"
  # The ceiling that was typed last holds. `finetune train --resume` reads the config of the run, and lets its budget change.
  sed "s/^  max_run_usd: .*/  max_run_usd: $MAX_RUN_USD/" "$run/config.yaml" >"$run/.config.yaml.tmp"
  mv "$run/.config.yaml.tmp" "$run/config.yaml"
  command=("${trainer[@]}" --resume "$run")
  say "going on with $run"
}

require_bucket
positive MAX_RUN_USD
export GRACE_SECONDS
set_trainer
name=$(run_name)
run="$MOUNT/runs/$name"
export WANDB_RUN_ID="$name" WANDB_NAME="$name" WANDB_RESUME=allow
remove_unbegun
if [ -e "$run/run.json" ]; then
  status=$(record_value "$run" status)
  if [ "$status" = "done" ]; then
    say "$run is done; score it with: sky launch sky/evaluate.yaml --env RUN_NAME=$name"
    exit 0
  fi
  prepare_resume
else
  prepare_start
fi
hours=$(limit_hours)
start_tensorboard
say "training for at most $hours hours on this machine"
run_limited "$hours" "${command[@]}"
case $code in
  0) say "ended; score it with: sky launch sky/evaluate.yaml --env RUN_NAME=$name" ;;
  124)
    say "$hours hours are over (MAX_HOURS=$MAX_HOURS, MAX_RUN_USD=$MAX_RUN_USD): stopped, the newest checkpoint is kept in" \
      "$run; to go on, launch again with --env RUN_NAME=$name and a higher limit"
    code=0  # a managed job must not restart it
    ;;
esac
exit "$code"
