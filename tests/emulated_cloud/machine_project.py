"""The project's own part of the machines' image: what on_machine/setup.sh installs, by that script, before any machine
starts.

On a rented machine this takes minutes and the registry; here it is done once, as the machine's user, in the folder that
SkyPilot will sync the project to. A launch then finds the stamp of a set-up that is whole, as a second launch on a machine does.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.emulated_cloud.machine_image import USER, check, put_hook, running, user_env

ROOT = Path(__file__).resolve().parents[2]
WORKDIR = f"/home/{USER}/sky_workdir"
PACKAGES = f"/home/{USER}/finetune-env/lib/python3.11/site-packages"
NOT_COMPILED = "/tests/|/transformers/models/(?!auto/|llama/).*/(modeling|modular|convert)_"
"""Python files that no machine imports: a quarter of the work of compiling. (Transformers does import the image processors.)"""
SETTINGS = {"FINETUNE_ALLOW_CPU": "1", "UV_TORCH_BACKEND": "auto"}
"""The first is to be handed to `sky launch --env` as well, because there is no GPU; the second is what the script finds by
itself on every GPU but the V100, and is part of the stamp."""


def checkout(folder: Path) -> Path:
    """A copy of the project as git would hand it out, uncommitted changes included."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder


def fingerprint() -> str:
    names = ("constraints.txt", "pyproject.toml", "on_machine/setup.sh", "on_machine/package.sh")
    files = [ROOT / name for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prepare_project(image: Path) -> None:
    """Adds ~/finetune-env to the image in `image` (as `machine_image.prepare` made it) unless it is there, and the stamp that
    the tasks which train find.

    Not while a machine runs: they share the image. Raises AssertionError with the output of what failed.
    """
    done = image / "project"
    key = fingerprint()
    folder = image / "layer"
    if done.exists() and done.read_text() == key:
        put_hook(folder / "upper", PACKAGES)
        return
    with running(folder) as booted:
        place = folder / "upper" / WORKDIR[1:]
        shutil.rmtree(place, ignore_errors=True)
        checkout(place)
        check(booted.run(["chown", "-R", f"{USER}:{USER}", WORKDIR], env=user_env()))
        env = user_env() | SETTINGS
        command = f"cd {WORKDIR} && bash on_machine/setup.sh"
        check(booted.run(["bash", "-c", command], user=USER, env=env, timeout=1800))
        put_hook(folder / "upper", PACKAGES)
        compiling = ["python3.11", "-m", "compileall", "-q", "-j", "2", "-x", NOT_COMPILED, PACKAGES]
        booted.run(compiling, user=USER, env=env, timeout=900)
        check(booted.run(["rm", "-rf", WORKDIR, f"/home/{USER}/.cache"], env=user_env()))
    done.write_text(key)
