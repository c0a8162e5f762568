"""The disk image that emulated machines start from: a layer over this computer's own files, prepared once.

It holds what Google's image has and this computer lacks (the user, its rights, sshd's settings), what SkyPilot would install
in every machine at its start (uv, Python 3.10, ray, its own wheel), and the stand-ins for nvidia-smi and gcsfuse. All of that
is installed by SkyPilot's own commands, run as the machine's user, so a machine finds its work done and starts in seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.emulated_cloud.machine_process import Booted
from tests.emulated_cloud.possible import python310

HERE = Path(__file__).resolve().parent
USER = "gcpuser"
CARRIED = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
CARRIED_PREFIXES = ("PIP_", "UV_")
"""Variables that say how package registries are reached; they hold in the machines too."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = "/opt/python3.10"
PACKAGES = "/usr/local/lib/ft-python"
RUNTIME = f"/home/{USER}/skypilot-runtime/lib/python3.10/site-packages"
RAY = {"RAY_worker_niceness": "5"}
"""By itself Ray gives jobs 15, at which training here starves: several machines share these processors."""
SSHD = """\
Port 22
UsePAM no
PasswordAuthentication no
PermitRootLogin no
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
UseDNS no
PrintMotd no
MaxSessions 200
MaxStartups 150:30:200
"""


def registry_env() -> dict[str, str]:
    """As this process has them; uv does not read pip's."""
    env = {name: text for name, text in os.environ.items() if name in CARRIED or name.startswith(CARRIED_PREFIXES)}
    links = env.get("PIP_FIND_LINKS")
    return env | ({"UV_FIND_LINKS": links} if links and "UV_FIND_LINKS" not in env else {})


def user_env() -> dict[str, str]:
    home = f"/home/{USER}"
    return {
        "HOME": home,
        "USER": USER,
        "LOGNAME": USER,
        "SHELL": "/bin/bash",
        "PATH": PATH,
        "LANG": "C.UTF-8",
    } | registry_env()


def prepare(folder: Path, home: Path, env: dict[str, str]) -> Path:
    """Makes the image in `folder`, unless a whole one is there.

    Args:
        home: SkyPilot's home of this test, whose wheel goes into the image; env: the environment that SkyPilot runs in.

    Returns: the layer, for `Machine`. Raises AssertionError with the output of what failed.
    """
    wheel, wheel_hash = sky_wheel(env)
    layer, done = folder / "layer" / "upper", folder / "done"
    if done.exists() and done.read_text() == wheel_hash:
        put_programs(layer)
        put_hook(layer, RUNTIME)
        return layer
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(layer)
    with running(folder / "layer") as booted:
        make_user(booted)
        install(booted, wheel, wheel_hash, layer)
    done.write_text(wheel_hash)
    return layer


@contextmanager
def running(folder: Path) -> Iterator[Booted]:
    """The image whose layer is `folder`/upper, in the network of this computer, so that things can be installed in it."""
    settings: dict[str, Any] = {"name": "image", "folder": str(folder), "image": None, "network": None, "services": []}
    booted = Booted(settings | {"env": {}}, own_network=False)
    try:
        booted.boot()
        yield booted
    finally:
        booted.power_off()


def lay_out(layer: Path) -> None:
    """The parts for which nothing has to run in the image."""
    get_packages(layer)
    (layer / "var" / "tmp").mkdir(parents=True)
    os.setxattr(layer / "var" / "tmp", "trusted.overlay.opaque", b"y")  # a machine is not to see this computer's
    (layer / "var" / "tmp").chmod(0o1777)
    (layer / "etc" / "ssh").mkdir(parents=True)
    (layer / "etc" / "ssh" / "sshd_config").write_text(SSHD + set_env(), encoding="utf-8")
    (layer / "etc" / "fuse.conf").write_text("user_allow_other\n", encoding="utf-8")
    (layer / "etc" / "sudoers.d").mkdir(mode=0o750)
    (layer / "etc" / "sudoers.d" / "ft-cloud").write_text(f"{USER} ALL=(ALL) NOPASSWD:ALL\n", encoding="utf-8")
    put_programs(layer)
    python = python310()
    assert python, "no Python 3.10 on this computer: SkyPilot's runtime needs one"
    shutil.copytree(python, layer / PYTHON[1:], symlinks=True)
    (layer / "usr" / "local" / "bin" / "python3.10").symlink_to(f"{PYTHON}/bin/python3.10")
    (layer / "etc" / "ld.so.conf.d").mkdir()
    (layer / "etc" / "ld.so.conf.d" / "ft-python.conf").write_text(f"{PYTHON}/lib\n", encoding="utf-8")


def put_programs(layer: Path) -> None:
    """The stand-ins, as they are now: an image that is kept may have older ones."""
    programs = layer / "usr" / "local" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    put(HERE / "programs" / "ft_storage.py", layer / PACKAGES[1:], 0o644)
    for program in ("nvidia-smi", "gcsfuse", "gsutil", "gcloud"):
        put(HERE / "programs" / program, programs, 0o755)


def put_hook(layer: Path, packages: str) -> None:
    """Into one of the machines' Python environments. packages: its folder of packages, as the machine has it. By a .pth file,
    because Debian's Python brings a sitecustomize of its own, which comes first."""
    for name in ("ft_cloud_hook.py", "ft_cloud_hook.pth"):
        put(HERE / "hook" / name, layer / packages[1:], 0o644)


def put(file: Path, folder: Path, mode: int) -> None:
    """Leaves alone what is the same already: machines of another session may be running from it."""
    target = folder / file.name
    if not target.exists() or target.read_bytes() != file.read_bytes():
        shutil.copy(file, target)
        target.chmod(mode)


def get_packages(layer: Path) -> None:
    """What the stand-ins need of the registry: FUSE for Python, and uv, of which a wrapper stands where SkyPilot looks."""
    place = layer / PACKAGES[1:]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), *machine_requirements()]
    check(subprocess.run(command, capture_output=True, text=True, check=False))


def machine_requirements() -> list[str]:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith(("uv==", "mfusepy=="))]


def set_env() -> str:
    """sshd's line for the variables of every session; it reads only the first such line."""
    found = [f'{name}="{text}"' for name, text in sorted((registry_env() | RAY).items())]
    return f"SetEnv {' '.join(found)}\n"


def make_user(booted: Booted) -> None:
    for command in (
        ["ldconfig"],
        ["useradd", "--create-home", "--shell", "/bin/bash", "--password", "*", USER],
        ["chmod", "440", "/etc/sudoers.d/ft-cloud"],
        ["ssh-keygen", "-A"],
    ):
        check(booted.run(command, env={"PATH": PATH}))


def install(booted: Booted, wheel: Path, wheel_hash: str, layer: Path) -> None:
    """uv, then what SkyPilot's own commands install. They are those of the machine's first start, word for word."""
    from sky.skylet import constants

    home = layer / "home" / USER  # the running image's /home is this very folder
    target = home / ".local" / "bin"
    target.mkdir(parents=True)
    wheels = home / ".sky" / "wheels" / wheel_hash
    wheels.mkdir(parents=True)
    shutil.copy(wheel, wheels)
    shutil.copy(HERE / "programs" / "uv", target / "uv")
    check(booted.run(["chown", "-R", f"{USER}:{USER}", f"/home/{USER}"], env={"PATH": PATH}))
    runtime = constants.RAY_SKYPILOT_INSTALLATION_COMMANDS.replace("{sky_wheel_hash}", wheel_hash).replace(
        "{cloud}", "gcp"
    )
    for script in (constants.UV_INSTALLATION_COMMANDS, constants.SKY_USER_ENV_CREATION_COMMANDS, runtime):
        check(booted.run(["bash", "-c", script], user=USER, env=user_env()))
    put_hook(layer, RUNTIME)
    compiling = [f"/home/{USER}/skypilot-runtime/bin/python", "-m", "compileall", "-q", "-j", "2", RUNTIME]
    booted.run(compiling, user=USER, env=user_env())  # else every machine does it; some files of other Pythons fail
    check(
        booted.run(
            ["rm", "-rf", f"/home/{USER}/.cache/uv", f"/home/{USER}/.sky/wheels/{wheel_hash}"], env={"PATH": PATH}
        )
    )


def sky_wheel(env: dict[str, str]) -> tuple[Path, str]:
    """SkyPilot built for its machines, where it will look for it itself, and its hash."""
    script = "from sky.backends import wheel_utils as w; w.build_sky_wheel(); print(w._get_latest_wheel())"
    done = check(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False))
    wheel = Path(done.stdout.split()[-1])
    return wheel, wheel.parent.name


def check(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
