#!/usr/bin/env bash
# Watches the disk of a cloud machine while a process runs, detached from the job's processes: on_machine/room.sh PID FILE
#
# A full disk does not only end the run: SkyPilot can then write neither the job's log nor its status, shows it as RUNNING for
# ever, and autostop never terminates the machine. So FILE reserves a hundredth of the disk, 2 GiB at most. When no more than that
# is left, the process gets SIGTERM and FILE is deleted: enough space to save a checkpoint, and for SkyPilot to end the job.
# FILE.full then holds the MiB that were left. When the process ends, FILE is deleted too. Each process has a FILE of its own: the
# first one to be stopped leaves the reserves of the others, which go on.
set -u
readonly PROCESS="$1" FILE="$2" MOST_MIB=2048 SECONDS_BETWEEN=1
mib() { df --output="$1" --block-size=1M "${FILE%/*}" | tail -n 1 | tr -d ' '; }

room=$(($(mib size) / 100))
[ "$room" -le "$MOST_MIB" ] || room=$MOST_MIB
if ! fallocate -l "${room}M" "$FILE"; then
  rm -f "$FILE"
  [ "$(mib avail)" -le "$room" ] || exit 0  # not supported by the file system: no watch
fi
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
