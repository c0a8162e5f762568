"""A test session's place on this computer, and the removal of what a session left that was killed.

`python -m tests.emulated_cloud.orphans begin PID` removes what is left over, then makes and prints a folder for what
the processes of one `make cloud-test` share (the image, pytest's folders); it is left over when process PID is gone.
`end PID` removes both.

A session owns a folder ft-cloud-<slot> of the temporary folder, with the process that owns it written in it. Making the folder
is what takes the slot, and the slot names everything else: the bridge ft-bridge<slot>, interfaces ft<slot>v*, addresses
10.128.<16 slot>.0/20, SkyPilot's user and with it /tmp/sky_ssh_<user>, and processes, which are known by a HOME inside the
folder. Whatever bears such a name, and whose owner is gone, is provably left over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

REMOVERS = 16
"""Threads that remove files."""
SLOTS = 8
"""Sessions at a time on one computer."""
OWNER = "owner"
STARTS = (b"machine_init.py\0", b"\0--target\0")
"""In a command's words, before a path in a session's folder: the first process of a machine, and pip."""
SHARED = "ft-cloud-shared-"
"""What the names of those folders begin with."""


def place(slot: int) -> Path:
    return Path(tempfile.gettempdir()) / f"ft-cloud-{slot}"


def sky_user(slot: int) -> str:
    """What SkyPilot knows a user by, in place of a hash of name and computer."""
    return f"ftcloud{slot}"


def sky_ssh(slot: int) -> Path:
    """Where that user's SkyPilot keeps its connections: in /tmp, whatever the environment says."""
    return Path("/tmp") / f"sky_ssh_{sky_user(slot)}"


def birth(pid: int) -> str:
    """When a process began, in ticks since boot: with its number it names the process for good. "" if there is none, or only what
    its parent has not yet asked about."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def take_slot() -> tuple[int, Path]:
    """A slot of our own; all slots of sessions that are gone are cleaned up first. Raises AssertionError if all are taken."""
    with one_at_a_time():
        clean_abandoned()
        for slot in range(SLOTS):
            folder = place(slot)
            try:
                folder.mkdir(mode=0o755)
            except FileExistsError:
                continue
            sign(folder, os.getpid())
            return slot, folder
    raise AssertionError(f"{place(0)} and its {SLOTS - 1} neighbours belong to other test sessions that run")


def shared(pid: int) -> Path:
    return place(0).parent / f"{SHARED}{pid}"


def share(pid: int) -> Path:
    """Makes the folder that the processes of a session share, which ends with process `pid`. For `one_at_a_time`."""
    remove_shared(shared(pid))  # of another process that had this number
    shared(pid).mkdir(mode=0o755)
    sign(shared(pid), pid)
    return shared(pid)


def remove_shared(folder: Path) -> None:
    end_processes(folder)
    remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """An image has 30,000 files. Where each one's blocks are discarded on the disk, a file takes milliseconds of waiting, which
    many at a time share (measured for half an image: more than 2 minutes one by one, 14 s with 16)."""

    def remove(path: Path) -> None:
        with suppress(OSError):
            path.unlink()

    with ThreadPoolExecutor(REMOVERS) as pool:
        for inside, _, files in os.walk(folder):
            for file in files:
                pool.submit(remove, Path(inside, file))
    shutil.rmtree(folder, ignore_errors=True)


def clean_abandoned() -> None:
    """Whatever sessions have left that are gone. For `one_at_a_time`."""
    for slot in range(SLOTS):
        if place(slot).exists() and abandoned(place(slot)):
            clean(slot)
    for folder in place(0).parent.glob(f"{SHARED}*"):
        if abandoned(folder):
            remove_shared(folder)


def sign(folder: Path, pid: int) -> None:
    (folder / OWNER).write_text(f"{pid} {birth(pid)}")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Sessions that begin together see the same orphans: without this one removes what the other has just made there."""
    folder = os.open(place(0).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def abandoned(folder: Path) -> bool:
    try:
        pid, born = (folder / OWNER).read_text().split()
    except (OSError, ValueError):
        return time.time() - folder.stat().st_mtime > 60  # killed between making the folder and signing it
    return birth(int(pid)) != born


def clean(slot: int) -> None:
    """Removes all that a session has made: processes, bridge, folder."""
    folder = place(slot)
    end_processes(folder)
    close_site(slot)
    shutil.rmtree(sky_ssh(slot), ignore_errors=True)
    remove_tree(folder)


def close_site(slot: int) -> None:
    """The bridge, also where there is none. Interfaces of machines go with the machines."""
    subprocess.run(["ip", "link", "delete", f"ft-bridge{slot}"], check=False, capture_output=True)


def end_processes(folder: Path) -> None:
    """Those of `ours`: SkyPilot's servers and the machines."""
    deadline = time.monotonic() + 10
    while (found := ours(folder)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def ours(folder: Path) -> list[int]:
    """Processes whose HOME, as they were started, or whose first file lies in the folder, or that install something there; and
    those of SkyPilot that work there: the title that they give themselves is written over their environment."""
    mark = f"{folder}/".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if pid == os.getpid():
            continue
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            titled = command.startswith(b"SkyPilot:") and os.readlink(process / "cwd").startswith(f"{folder}/")
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        home = any(one.startswith(b"HOME=" + mark) for one in variables)
        if state != "Z" and (home or titled or any(word + mark in command for word in STARTS)):
            found.append(pid)
    return found


def mounts_of(folder: Path) -> list[str]:
    """Mounts inside the folder that this computer sees; machines have theirs in namespaces of their own."""
    lines = subprocess.run(
        ["findmnt", "-rno", "TARGET"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return [line for line in lines if line.startswith(f"{folder}/")]


def main(verb: str, pid: int) -> None:
    with one_at_a_time():
        if verb == "end":
            remove_shared(shared(pid))
        clean_abandoned()
        if verb == "begin":
            print(share(pid))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
