"""The first process (PID 1) of an emulated machine: mounts its disk, starts its services, reaps its dead, ends with its parent.

Started by `machine.Machine` inside namespaces of its own, with the path of a JSON file that says what is to be mounted and run.
It talks in lines over its standard streams: it says `namespaces`, waits for `network`, says `up` when the services are
started; then it obeys `terminate` (SIGTERM to every process, as a shutdown does) and ends at the end of its input. The kernel
kills whatever else runs in the machine then, so a test that dies takes its machines with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
PARTS = ("usr", "etc", "var", "opt")
LINKED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
EMPTY = {
    "proc": 0o755,
    "sys": 0o755,
    "dev": 0o755,
    "run": 0o755,
    "tmp": 0o1777,
    "root": 0o700,
    "mnt": 0o755,
    "srv": 0o755,
}
PIVOT_ROOT = 155
"""The number of this system call on x86-64, for which glibc has no wrapper."""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def sized_disk(machine: Path, size: int) -> Path:
    """Where the machine's disk lies: its folder, or on memory of so many bytes that this namespace alone sees."""
    if not size:
        return machine
    disk = machine / "disk"
    disk.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"mode=755,size={size}", "ft-disk", str(disk))
    return disk


def mount_disk(image: Path | None, machine: Path) -> Path:
    """The machine's root. PARTS are layers: what the machine wrote, over the image, over this computer's own folders.

    /home comes from the image alone, and nothing else of this computer is there. A folder for each, because an overlay takes
    no two layers of which one lies inside the other, and all lie inside this computer's /.
    """
    root = machine / "root"
    root.mkdir(exist_ok=True)
    run("mount", "--bind", str(root), str(root))
    for name in LINKED:
        place = Path("/", name)
        if place.is_symlink() and not (root / name).is_symlink():
            (root / name).symlink_to(place.readlink())
    parts = [*PARTS, *(name for name in LINKED if Path("/", name).is_dir() and not Path("/", name).is_symlink())]
    for name in parts:
        mount_part(name, [*([image / name] if image else []), Path("/", name)], machine)
    mount_part("home", [image / "home"] if image else [], machine)
    for name, mode in EMPTY.items():
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    return root


def mount_part(name: str, layers: list[Path], machine: Path) -> None:
    upper, work, target = (machine / folder / name for folder in ("upper", "work", "root"))
    for folder in (upper, work, target):
        folder.mkdir(parents=True, exist_ok=True)
    if not layers:
        run("mount", "--bind", str(upper), str(target))
        return
    lower = ":".join(str(layer) for layer in layers if layer.is_dir())
    run("mount", "-t", "overlay", "ft-disk", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", str(target))


def mount_system(root: Path, own_network: bool) -> None:
    """proc, sys and dev. sysfs shows the network namespace that it is mounted in, so it is not taken along."""
    run("mount", "-t", "proc", "proc", str(root / "proc"))
    if own_network:
        run("mount", "-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    dev = root / "dev"
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(dev))
    for name in DEVICES:
        if Path("/dev", name).exists():
            open_to_all(Path("/dev", name), dev / name)
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620,gid=5", "devpts", str(dev / "pts"))
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(dev / "shm"))
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "run"))
    (root / "run" / "sshd").mkdir()


def open_to_all(device: Path, path: Path) -> None:
    """The device at `path` too, for every user as on Google's images: without udev /dev/fuse is root's alone."""
    about = device.stat()
    if about.st_mode & 0o666 == 0o666:
        path.touch()
        run("mount", "--bind", str(device), str(path))
        return
    os.mknod(path, stat.S_IFCHR | 0o666, about.st_rdev)
    path.chmod(0o666)


def enter(root: Path) -> None:
    """pivot_root, so that nothing of the computer's other mounts is left to be seen."""
    os.chdir(root)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(PIVOT_ROOT, b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    run("umount", "-l", ".")
    os.chdir("/")


def set_up_network(address: str, gateway: str, metadata: str) -> None:
    for command in (
        "ip link set lo up",
        f"ip address add {metadata}/32 dev lo",
        f"ip address add {address} dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {gateway}",
    ):
        run(*command.split())


def write(path: str, text: str, user: str = "root") -> None:
    """A file of the machine, its folder included."""
    account, file = pwd.getpwnam(user), Path(path)
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
    for one in (file, *([file.parent] if user != "root" else [])):
        os.chown(one, account.pw_uid, account.pw_gid)


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    log = Path("/var/log/ft-machine.log").open("ab")  # noqa: SIM115  # the service keeps it
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True)


def reap(keep: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in keep:
            sys.stdout.write(f"ended {pid} {os.waitstatus_to_exitcode(status)}\n")


def obey(line: str) -> None:
    if line == "terminate":
        os.kill(-1, signal.SIGTERM)  # every process that may be reached but this one


def serve(services: set[int]) -> None:
    """Until the input ends."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    buffer = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
        reap(services)
        if 0 in ready:
            data = os.read(0, 4096)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                obey(line.decode())


def main(settings: dict[str, Any]) -> None:
    own_network = settings["network"] is not None
    print("namespaces", flush=True)
    if sys.stdin.buffer.raw.readline().strip() != b"network":  # type: ignore[union-attr]
        return
    run("mount", "--make-rprivate", "/")
    disk = sized_disk(Path(settings["folder"]), settings.get("disk_bytes", 0))
    root = mount_disk(Path(settings["image"]) if settings["image"] else None, disk)
    mount_system(root, own_network)
    if own_network:
        set_up_network(**settings["network"])
    run("hostname", settings["name"])
    enter(root)
    for file in settings.get("files", []):
        write(**file)
    services = {start(command, settings["env"]).pid for command in settings["services"]}
    print("up", flush=True)
    serve(services)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
