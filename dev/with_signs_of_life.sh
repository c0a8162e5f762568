#!/usr/bin/env bash
# Runs a command, and says every 20 s how much a folder holds by now: pip unpacks gigabytes without a word.
# dev/with_signs_of_life.sh FOLDER COMMAND ...
set -uo pipefail
folder=$1
shift
# Only this script holds the other end of the pipe: its end is seen at once, even if it was killed and whatever signals are ignored.
exec 3> >(
    while :; do
        read -r -t "${SIGN_SECONDS:-20}"
        [ $? -gt 128 ] || exit 0  # not a timeout
        echo "set-up: $(du -sm "$folder" 2>/dev/null | cut -f1) MB in $folder so far"
    done
)
"$@" 3>&-
