"""A run on a disk that fills up in the middle, is full when it goes on, and has room again at last."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from chaos.attempt import Kill
from chaos.environment import Kind
from chaos.soak import Harness, Run, last_line
from finetune.errors import EXIT_OK, EXIT_USER_ERROR

SIZE = "16m"
"""Of the disk: room for the checkpoints, the adapter and what else a run writes, several times over."""
BLOCK = 4096


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of its own, mounted at `folder`; None where this process may not mount one."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or _call("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)):
        yield None
        return
    try:
        yield folder
    finally:
        _call("umount", "--lazy", str(folder))


def fill(disk: Path, *, leave: int = 0) -> None:
    """Take all of its space but `leave` bytes."""
    with (disk / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - leave))


def free(disk: Path) -> None:
    (disk / "filler").unlink()


def on_a_full_disk(harness: Harness, kind: Kind, disk: Path, name: str) -> Run:
    """Fills the disk in the middle of the first attempt, resumes while it is full, and while there is room for a record but not
    for a checkpoint; then frees it, kills the run once more, and lets it end."""
    harness = replace(harness, runs=disk)
    run = Run(name, kind, harness.folder(name))
    begun = 2 * kind.interval + 1
    complaints = [
        harness.one_attempt(run, None, action=(begun, lambda: fill(disk)), full_disk=True),
        harness.one_attempt(run, None, full_disk=True),
    ]
    free(disk)
    fill(disk, leave=16 * BLOCK)
    complaints.append(harness.one_attempt(run, None, full_disk=True))
    free(disk)
    faults = [
        f"on a full disk attempt {number} ended with exit code {made.code} and said: {last_line(made.output)}"
        for number, made in enumerate(complaints, 1)
        if made.code != EXIT_USER_ERROR or "no space" not in last_line(made.output).lower()
    ]
    harness.one_attempt(run, Kill("step", count=begun + kind.interval, delay=0.02))
    made = harness.one_attempt(run, None)
    if made.code != EXIT_OK:
        faults.append(f"with room again: exit code {made.code}: {last_line(made.output)}")
    run.fault = "; ".join(faults) or None
    return harness.close(run)


def _call(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode
