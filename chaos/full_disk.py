"""A run on a disk that fills up during training, is still full when the run resumes, and finally has space again."""

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
"""Size of the disk: several times what the checkpoints, the adapter and all other files of a run need."""
BLOCK = 4096


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A separate disk mounted at `folder`; None if this process may not mount one."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or _call("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)):
        yield None
        return
    try:
        yield folder
    finally:
        _call("umount", "--lazy", str(folder))


def fill(disk: Path, *, leave: int = 0) -> None:
    """Use up all of its space except `leave` bytes."""
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
    """Fill the disk during the first attempt, resume while it is full and while there is space for run.json but not for a
    checkpoint; then free it, kill the run once more, and let it finish."""
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
        f"attempt {number} on a full disk ended with exit code {made.code}: {last_line(made.output)}"
        for number, made in enumerate(complaints, 1)
        if made.code != EXIT_USER_ERROR or "no space" not in last_line(made.output).lower()
    ]
    harness.one_attempt(run, Kill("step", count=begun + kind.interval, delay=0.02))
    made = harness.one_attempt(run, None)
    if made.code != EXIT_OK:
        faults.append(f"after freeing the disk: exit code {made.code}: {last_line(made.output)}")
    run.fault = "; ".join(faults) or None
    return harness.close(run)


def _call(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode
