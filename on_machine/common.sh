# shellcheck shell=bash
# What the scripts share that run on a rented machine; each begins with: . "$(dirname "$0")/common.sh"
# ~/finetune-env is the environment that on_machine/setup.sh has made. The work itself is in finetune/job/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$HOME/finetune-env/bin:$PATH"
