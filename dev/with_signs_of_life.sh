#!/usr/bin/env bash
# Runs a command, and says every 20 s how much a folder holds by now: pip unpacks gigabytes without a word.
# dev/with_signs_of_life.sh FOLDER COMMAND ...
set -uo pipefail
folder=$1
shift
(
    while sleep "${SIGN_SECONDS:-20}" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do  # $$: this script, even if it was killed
        echo "set-up: $(du -sm "$folder" 2>/dev/null | cut -f1) MB in $folder so far"
    done
) &
ticker=$!
trap 'kill "$ticker" 2>/dev/null' EXIT
"$@"
