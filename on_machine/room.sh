#!/usr/bin/env bash
# Watches the disk of a rented machine while a process runs, outside the job's own processes: on_machine/room.sh PID FILE
#
# A full disk ends more than the run. SkyPilot, which can then write neither a job's log nor its end, has it RUNNING for ever,
# and autostop never takes the machine away. So a hundredth of the disk is kept as FILE, 2 GiB at most. When as little is left
# the process gets SIGTERM, and its room is given back: enough to save what was learned, and for SkyPilot to end the job.
# FILE.full says so afterwards, with the MiB that were left. Without the process FILE goes too.
set -u
readonly PROCESS="$1" FILE="$2" MOST_MIB=2048 SECONDS_BETWEEN=1
mib() { df --output="$1" --block-size=1M "${FILE%/*}" | tail -n 1 | tr -d ' '; }

room=$(($(mib size) / 100))
[ "$room" -le "$MOST_MIB" ] || room=$MOST_MIB
fallocate -l "${room}M" "$FILE" || exit 0  # a disk that cannot: nothing to watch with
while kill -0 "$PROCESS" 2>/dev/null; do
  left=$(mib avail)
  if [ "$left" -le "$room" ]; then
    rm -f "$FILE"
    kill -TERM "$PROCESS"
    echo "$left" >"$FILE.full"
    exit 0
  fi
  sleep "$SECONDS_BETWEEN"
done
rm -f "$FILE"
