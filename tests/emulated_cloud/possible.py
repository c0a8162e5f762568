"""Whether this computer can run the emulated cloud, and if not, why. `python -m tests.emulated_cloud.possible` prints it."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "sshd": "openssh-server",
    "rsync": "rsync",
    "ip": "iproute2",
    "fusermount3": "fuse3",
    "sudo": "sudo",
    "curl": "curl",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "nc": "netcat-openbsd",
    "ps": "procps",
    "ssh-keygen": "openssh-client",
}
"""Program -> Debian package: those of packages.txt, and some that nearly every computer has."""
SYSTEM_PYTHON = Path("/usr/bin/python3")
"""Of Debian's package python3; on the machines the stand-ins for Google's programs run with it."""
REQUIRED = "FT_CLOUD_REQUIRED"
"""Set to 1 where these tests must run: they then fail instead of being skipped."""
ADDRESSES, BRIDGE = ipaddress.IPv4Network("10.128.0.0/17"), "ft-bridge"
"""The addresses of the machines of all slots (orphans.SLOTS, machine.Site), and how the names of their bridges begin."""
PYENVS = ("pyenv/shims", "pyenv/bin")
"""How the folders end that pyenv puts on PATH."""
ATTEMPT = """\
set -e
mkdir "$1/up" "$1/work" "$1/on" && mount -t overlay x -o "lowerdir=/usr,upperdir=$1/up,workdir=$1/work" "$1/on"
ip link add ft-try type bridge && ip link add ft-a type veth peer name ft-b
"""
"""Run in its own namespaces: tries what a machine needs of the kernel. The folder is its argument."""


def missing() -> str:
    """Why the emulated cloud cannot run here, in one line; "" if it can."""
    return "; ".join(reasons())


def reasons() -> Iterator[str]:
    if not sys.platform.startswith("linux"):
        yield "it needs Linux (network namespaces, overlay mounts)"
        return
    root = os.geteuid() == 0
    if not root:
        yield "it needs root (network namespaces, overlay mounts)"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    lacking = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)}
    lacking |= set() if SYSTEM_PYTHON.exists() else {"python3"}
    if lacking:
        yield f"Debian packages are missing: apt-get install {' '.join(sorted(lacking))}"
    if not Path("/dev/fuse").exists():
        yield "/dev/fuse is missing"
    if subprocess.run([sys.executable, "-c", "import sky"], cwd="/", capture_output=True, check=False).returncode:
        yield "SkyPilot is not installed (extra `cloud`)"
    if python310() is None:
        yield "no Python 3.10 in a folder of its own, which SkyPilot's runtime on the machines wants: pyenv install 3.10"
    if not shutil.which("python3.11", path="/usr/local/bin:/usr/bin"):
        yield "no python3.11 in /usr/bin (Debian 12 has it), which on_machine/setup.sh wants on the machines"
    if root and not lacking:
        refused = kernel_refuses()
        if own := own_network():
            yield f"the machines' addresses ({ADDRESSES}) are of a network that this computer is in: {own}"
        if refused:
            yield f"namespaces, overlay mounts or bridges are not allowed: {refused}"


def own_network() -> str:
    """An address of the machines' range that this computer has or reaches, other than by the machines' bridges; "" without one.

    A wider route, such as a VPN's to 10.0.0.0/8, is no problem: the machines' routes are narrower and take precedence.
    """
    command = ["ip", "-json", "-4", "route", "show", "table", "all"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    for row in json.loads(asked.stdout or "[]"):
        if str(row.get("dev", "")).startswith(BRIDGE):
            continue
        for place in (row.get("dst", "default"), row.get("gateway", "default")):
            if place != "default" and ipaddress.IPv4Network(place, strict=False).subnet_of(ADDRESSES):
                return f"{place} on {row.get('dev', 'no device')}"
    return ""


def kernel_refuses() -> str:
    """The kernel's error for a machine's mounts and network, tried in temporary namespaces; "" if it allows them."""
    with tempfile.TemporaryDirectory(prefix="ft-try-") as folder:
        alone = ["unshare", "--mount", "--net", "--pid", "--fork", "--propagation", "private"]
        tried = subprocess.run(
            [*alone, "bash", "-c", ATTEMPT, "bash", folder], capture_output=True, text=True, check=False
        )
    return "" if tried.returncode == 0 else (tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]


def python310() -> Path | None:
    """The folder of a Python 3.10 on this computer that can be copied into the machines; None without one.

    It need not be in HOME or be pyenv's global version. Searched are pyenv's folders (by PYENV_ROOT, the home, the programs on
    PATH, and this Python itself if it is one of pyenv's), GitHub's tool cache, and PATH.
    """
    roots = [os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv")]
    roots += [str(Path(part).parent) for part in os.environ.get("PATH", "").split(os.pathsep) if part.endswith(PYENVS)]
    places = [(Path(root, "versions"), "3.10*") for root in roots if root]
    places += [(Path(sys.base_prefix).parent, "3.10*"), (Path("/opt/hostedtoolcache/Python"), "3.10*/x64")]
    builds = [build for folder, name in places for build in _builds(folder, name)]
    return builds[0] if builds else _on_path()


def _builds(folder: Path, name: str) -> list[Path]:
    """The newest first; none if the folder cannot be read."""
    try:
        return [build for build in sorted(folder.glob(name), reverse=True) if (build / "bin" / "python3.10").exists()]
    except OSError:
        return []


def _on_path() -> Path | None:
    """The prefix of the program python3.10, unless it is the system's own, whose files are all over /usr."""
    program = shutil.which("python3.10")
    if program is None:
        return None
    script = "import sys; print(sys.base_prefix)"
    asked = subprocess.run([program, "-c", script], capture_output=True, text=True, check=False)
    prefix = Path(asked.stdout.strip())
    return prefix if asked.returncode == 0 and prefix != Path("/usr") else None


if __name__ == "__main__":
    reason = missing()
    print(reason)
    sys.exit(1 if reason else 0)
