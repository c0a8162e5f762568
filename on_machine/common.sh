# shellcheck shell=bash
# Shared by the scripts that run on a cloud machine; each begins with: . "$(dirname "$0")/common.sh"
# ~/finetune-env is the environment created by on_machine/setup.sh. The work itself is in finetune/job/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$HOME/finetune-env/bin:$PATH"
