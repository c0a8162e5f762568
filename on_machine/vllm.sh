#!/usr/bin/env bash
# Builds ~/finetune-vllm, the environment of vLLM, which pins a PyTorch of its own, beside that of training.
#
# on_machine/setup.sh starts it in the background, so that training does not wait for it; only an evaluation does (VLLM_MINUTES).
# The folder has this name only when it is complete and vLLM can be imported from it. ~/.finetune/vllm.lock is locked, by
# whoever started this on descriptor 9, as long as it runs; ~/.finetune/vllm.missing says in one line why there is no environment.
#
# Environment: FINETUNE_VLLM_GIB  free disk space that is asked for
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
readonly ENVIRONMENT="$HOME/finetune-vllm" STATE="$HOME/.finetune" STAMP="$1" UV="$2"
readonly PART="$ENVIRONMENT.part" OLD="$ENVIRONMENT.old" CONSTRAINTS=on_machine/vllm-constraints.txt
readonly NEEDED_GIB="${FINETUNE_VLLM_GIB:-20}"
# shellcheck source=on_machine/package.sh
. on_machine/package.sh
step="its environment could not be built"

why_not() {
  printf '%s\n' "$*" >"$STATE/vllm.missing.part" && mv "$STATE/vllm.missing.part" "$STATE/vllm.missing"
  rm -rf "$PART" || true
  exit 1
}

free_gib=$(($(df --output=avail --block-size=1M "$HOME" | tail -n 1) / 1024))
[ "$free_gib" -ge "$NEEDED_GIB" ] || why_not "$free_gib GiB of disk are free, and its environment needs $NEEDED_GIB"
trap 'why_not "$step (see ~/.finetune/vllm.log)"' ERR

unset UV_TORCH_BACKEND  # of the environment of training; the torch that vLLM pins is built for CUDA 13 in the index, too
rm -rf "$PART" "$OLD"
key=$(printf '%s\n' "$STAMP" "$HOME" "$(uname -m)" "$(getconf GNU_LIBC_VERSION)" | sha256sum | cut -c 1-32)
readonly KEPT="${FINETUNE_MOUNT:-/bucket}/packages/$key"
if [ -f "$KEPT/manifest.json" ] && python3 -m on_machine.kept fetch-packages "$KEPT" finetune-vllm; then
  if "$ENVIRONMENT/bin/python" -W ignore -c 'import vllm; print("vLLM", vllm.__version__)'; then
    rm -f "$STATE/vllm.missing"
    exit 0
  fi
  rm -rf "$ENVIRONMENT"  # it does not run here; built below
fi
step="its virtual environment could not be made"
"$UV" venv --quiet --relocatable --python 3.11 "$PART"
step="its packages could not be installed"
request ""
"$UV" pip install --python "$PART/bin/python" --constraints "$CONSTRAINTS" vllm "${REQUEST[@]}"
step="it was installed, but cannot be imported"
"$PART/bin/python" -W ignore -c 'import vllm; print("vLLM", vllm.__version__)'
printf '%s\n' "$STAMP" >"$PART/stamp"
step="its environment could not be put into place"
[ ! -e "$ENVIRONMENT" ] || mv "$ENVIRONMENT" "$OLD"
mv "$PART" "$ENVIRONMENT"
rm -rf "$OLD" "$STATE/vllm.missing"
exec 9>&-  # nobody has to wait for the rest
[ ! -d "${FINETUNE_MOUNT:-/bucket}" ] || python3 -m on_machine.kept keep-packages "$KEPT" finetune-vllm || true
