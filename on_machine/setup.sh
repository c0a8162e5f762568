#!/usr/bin/env bash
# Creates ~/finetune-env on a cloud machine from the pinned versions, with this program and with the PyTorch build that its GPU can run.
# If nothing has changed, a second launch installs nothing.
#
#   bash on_machine/setup.sh [ARGUMENT...]     further arguments are passed to another `uv pip install`
#
# Where vLLM runs, its environment is then built in the background (on_machine/vllm.sh), and nothing waits for it here.
#
# Environment: UV_TORCH_BACKEND  the build to install instead, such as cu128 (uv's names)
#              FINETUNE_VLLM_BUILD  auto: where the GPU and its driver allow; 0: never; 1: also without a GPU
#              FINETUNE_ALLOW_CPU=1  accept a machine without GPU
#              CONFIG, OVERRIDES, RUN_NAME  of the task: the model that they name is fetched beside the packages
#              FINETUNE_PRICES  the launch policy's price table; saved for later jobs of `sky exec`
set -euo pipefail
shopt -s inherit_errexit  # a failure inside $(...) ends the script too
cd "$(dirname "$0")/.."
readonly TREE=finetune-env STATE="$HOME/.finetune" MOUNT="${FINETUNE_MOUNT:-/bucket}"
readonly ENVIRONMENT="$HOME/$TREE"
# shellcheck source=on_machine/package.sh
. on_machine/package.sh

say() { printf 'set-up: %s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 2
}

age() {  # seconds since this machine was started, as finetune/machine/billed_time.py counts them
  LC_ALL=C awk -v ticks="$(getconf CLK_TCK)" \
    'NR == FNR { up = $1; next } { sub(/.*\) /, ""); printf "%.3f", up - $20 / ticks }' /proc/uptime /proc/1/stat
}

begin_log() {  # finetune/machine/set_up.py reads it; once a boot, because later set-ups do not begin with the machine
  local boot
  boot="$(cat /proc/sys/kernel/random/boot_id)/$(LC_ALL=C awk '{ sub(/.*\) /, ""); print $20 }' /proc/1/stat)"
  if [ "$(cat "$STATE/set-up.boot" 2>/dev/null)" = "$boot" ]; then
    rm -f "$STATE/set-up.log"
  else
    printf '%s\n' "$boot" >"$STATE/set-up.boot"
    : >"$STATE/set-up.log"
    mark boot
  fi
}

mark() { [ ! -f "$STATE/set-up.log" ] || printf '%s %s\n' "$(age)" "$1" >>"$STATE/set-up.log"; }

fact() { [ ! -f "$STATE/set-up.log" ] || printf '= %s %s\n' "$1" "$2" >>"$STATE/set-up.log"; }

given_configs() {  # what the task may train: its config, and that of the run in the bucket
  local file
  for file in "${CONFIG:-}" "$MOUNT/runs/${RUN_NAME:-.}/config.yaml"; do
    [ ! -f "$file" ] || cat "$file"
  done
}

trackers() {  # ",mlflow,trackio", those that the task names: the others are not installed
  local name words
  words="$(given_configs | sed 's/#.*//') ${OVERRIDES:-}"
  for name in mlflow trackio; do
    [[ $words != *"$name"* ]] || printf ',%s' "$name"
  done
}

fetch_model() {  # from the bucket, else from the hub, in the background beside the packages
  local config uv
  [ -d "$MOUNT" ] || return 0
  config=$(given_configs)
  uv=$(uv_program)
  # 8 is held until training may begin, 7 until the original weights are there, too
  exec 7>>"$STATE/four-bit.lock" 8>>"$STATE/model.lock"
  if flock --nonblock 7 && flock --nonblock 8; then
    FINETUNE_MODEL_LOCK=8 setsid --fork python3 -m on_machine.kept fetch-model "$MOUNT" "$uv" "${OVERRIDES:-}" "$config" \
      </dev/null >"$STATE/model.log" 2>&1
  fi
  exec 7>&- 8>&-
}

keep_prices() {
  if [ -n "${FINETUNE_PRICES:-}" ]; then
    (umask 077 && printf '%s\n' "$FINETUNE_PRICES" >"$STATE/prices.part" && mv "$STATE/prices.part" "$STATE/prices.json")
  fi
}

gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | sed -n 1p; }

torch_backend() {  # uv's name for a build of PyTorch; "" is the default of the package index
  local capability
  capability=$(gpu compute_cap) || capability=""
  if [ -n "${UV_TORCH_BACKEND:-}" ]; then
    printf '%s\n' "$UV_TORCH_BACKEND"
  elif [ "$capability" = 7.0 ]; then
    echo cu126  # V100: not supported by builds for CUDA 12.8 and later
  elif [[ $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
    echo auto  # the newest that the driver supports
  elif [ "${FINETUNE_ALLOW_CPU:-}" != 1 ]; then
    fail "no NVIDIA GPU: nvidia-smi is missing or does not answer; launch on a GPU, or set FINETUNE_ALLOW_CPU=1"
  fi
}

fingerprint() { { cat "$PINNED" "$DEFINITION" && printf '%s\n' "$PWD" "$@"; } | sha256sum | cut -c 1-64; }

uv_program() {
  local place="$HOME/.local/bin/uv"  # where SkyPilot puts it
  if [ ! -x "$place" ]; then
    place=$(command -v uv) || {
      say "uv is missing; installing it with pip"
      python3 -m pip install --quiet --user uv >&2 || fail "uv could not be installed; install it by hand, then launch again"
      place="$(python3 -m site --user-base)/bin/uv"
    }
  fi
  printf '%s\n' "$place"
}

install() {  # BACKEND TRACKERS [ARGUMENT...]
  local uv backend="$1" trackers="$2"
  shift 2
  uv=$(uv_program)
  request "train,export,serve$trackers"
  [ -x "$ENVIRONMENT/bin/python" ] || "$uv" venv --quiet --clear --python 3.11 "$ENVIRONMENT"
  "$uv" pip install --python "$ENVIRONMENT/bin/python" ${backend:+"--torch-backend=$backend"} \
    --only-binary :all: --constraints "$PINNED" --build-constraints "$PINNED" "${REQUEST[@]}"
  if [ $# -gt 0 ]; then
    "$uv" pip install --python "$ENVIRONMENT/bin/python" --constraints "$PINNED" "$@"
  fi
}

packages_key() {  # STAMP: of what decides which files are installed
  local driver
  driver=$(gpu driver_version) || driver=""
  printf '%s\n' "$1" "$HOME" "$(uname -m)" "$(getconf GNU_LIBC_VERSION)" "${driver%%.*}" | sha256sum | cut -c 1-32
}

from_bucket() {  # KEY: the environment as an earlier launch has kept it
  [ -f "$MOUNT/packages/$1/manifest.json" ] || return 1
  python3 -m on_machine.kept fetch-packages "$MOUNT/packages/$1" "$TREE" >&2 || return 1
  "$ENVIRONMENT/bin/python" -I -c 'import finetune' 2>/dev/null && [ -x "$ENVIRONMENT/bin/finetune" ] && return
  say "the environment from the bucket does not run here; installing it from the index"
  rm -rf "$ENVIRONMENT"
  return 1
}

check_gpu() {
  local build
  [ "${FINETUNE_ALLOW_CPU:-}" != 1 ] || return 0
  if ! build=$("$ENVIRONMENT/bin/python" -W ignore -c '
import torch
print(f"torch {torch.__version__} (CUDA {torch.version.cuda})", flush=True)
assert torch.cuda.is_available(), "torch.cuda.is_available() is false"
torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()' 2>&1); then
    fail "$(sed -n 1p <<<"$build") cannot use this GPU ($(gpu name), compute capability $(gpu compute_cap)," \
      "driver $(gpu driver_version)): $(sed -n '$p' <<<"$build"); another build can be chosen with --env UV_TORCH_BACKEND=NAME"
  fi
  say "$build on $(gpu name), driver $(gpu driver_version)"
}

why_no_vllm() {  # in a few words; nothing where it can be built
  local capability driver
  [ "${FINETUNE_VLLM_BUILD:-auto}" != 0 ] || { echo "its environment is not built (FINETUNE_VLLM_BUILD=0)"; return; }
  [ "${FINETUNE_VLLM_BUILD:-auto}" != 1 ] || return 0
  [ "${FINETUNE_ALLOW_CPU:-}" != 1 ] || { echo "this machine may have no GPU (FINETUNE_ALLOW_CPU=1)"; return; }
  capability=$(gpu compute_cap) driver=$(gpu driver_version)
  if [ "${capability%%.*}" -lt 8 ]; then
    echo "it is not built for a $(gpu name), whose compute capability, $capability, is below 8.0"
  elif [ "${driver%%.*}" -lt 580 ]; then
    echo "it needs a driver for CUDA 13 (580 or newer), and this one is $driver"
  fi
}

start_vllm() {
  local why stamp
  why=$(why_no_vllm)
  if [ -n "$why" ]; then
    printf '%s\n' "$why" >"$STATE/vllm.missing"
    return
  fi
  stamp=$({ cat on_machine/vllm.sh on_machine/vllm-constraints.txt "$DEFINITION" && printf '%s\n' "$PWD"; } | sha256sum | cut -c 1-64)
  exec 9>>"$STATE/vllm.lock"  # locked here, so that a job that starts at once sees that it is being built
  if ! flock --nonblock 9; then
    say "vLLM's environment is being built already"
  elif [ "$(cat "$HOME/finetune-vllm/stamp" 2>/dev/null)" = "$stamp" ]; then
    say "$HOME/finetune-vllm is up to date"
  else
    rm -f "$STATE/vllm.missing"
    say "vLLM's environment is built in the background: ~/.finetune/vllm.log"
    # detached, because SkyPilot ends the children of a set-up that has ended; it keeps the lock
    setsid --fork nice -n 19 bash on_machine/vllm.sh "$stamp" "$(uv_program)" </dev/null >"$STATE/vllm.log" 2>&1
  fi
  exec 9>&-
}

(umask 077 && mkdir -p "$STATE")
begin_log
keep_prices
backend=$(torch_backend)
trackers=$(trackers)
stamp=$(fingerprint "$backend$trackers" "$@")
key=$(packages_key "$stamp")
fetch_model
printf '%s\n' "$key" >"$STATE/packages.key"
rm -f "$STATE/packages.keys"
if [ -x "$ENVIRONMENT/bin/finetune" ] && [ "$(cat "$STATE/setup" 2>/dev/null)" = "$stamp" ]; then
  say "$ENVIRONMENT is up to date"
  fact packages_from here
else
  rm -f "$STATE/setup"
  if from_bucket "$key"; then
    fact packages_from bucket
  else
    install "$backend" "$trackers" "$@"
    fact packages_from index
    printf '%s %s\n' "$TREE" "$key" >"$STATE/packages.keys"  # kept in the bucket after the first step
  fi
  printf '%s\n' "$stamp" >"$STATE/setup"
fi
mark packages
check_gpu
mark gpu_check
start_vllm
