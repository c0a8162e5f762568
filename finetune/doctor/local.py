"""Checks whether this machine is ready: a row for each requirement of training or launching, with a remedy if it is not met.

The table may be pasted into an issue, so no row shows a key, a token or an e-mail address.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.doctor.check import Check, Need, Status
from finetune.doctor.check import absent as _absent
from finetune.doctor.cloud import cloud_checks
from finetune.doctor.keys import key_checks, tracker_checks
from finetune.errors import EXIT_MISSING, EXIT_OK, UserError
from finetune.machine.hardware import GIB, Driver, Hardware, TorchBuild, detect, nvidia_driver, runs_on, torch_build
from finetune.runtime.credentials import huggingface_home
from finetune.runtime.files import unix_line_ends_command, with_carriage_returns
from finetune.runtime.installed import PROJECT, install_command, project_files
from finetune.runtime.table import aligned
from finetune.sql.engines.sqlite import SqlSandbox

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISK_GIB = {"demo": 3.0, "7B": 20.0}
"""Estimated: a 7.24e9-parameter model in 16 bits is 13.5 GiB to download, the rest is for checkpoints."""
RAM_GIB = 7.5
"""The demo is limited to 8 GB; a machine with 8 GB reports slightly less."""
DRIVER_FLOOR = {12: 525, 13: 580}
"""CUDA major version -> first driver branch for all its minor versions (NVIDIA CUDA compatibility guide)."""
VOLTA = (7, 0)


def examine(need: Need = "train", root: Path | None = None, regions: list[str] | None = None) -> list[Check]:
    """All rows. need: what counts as missing if it is absent; anything else is then a warning or info.

    root: the folder whose constraints.txt holds the pinned versions, by default that of the checkout or the wheel; without that
    file only the minimum versions of the package's metadata are checked. regions: those whose GPU quotas are checked, the
    cheapest first; None for all. Takes as long as importing torch, or up to the time limit of gcloud's answers.
    """
    root = root or project_files()
    with ThreadPoolExecutor(max_workers=3) as pool:
        cloud = pool.submit(cloud_checks, need, regions)
        driver = pool.submit(nvidia_driver)
        torch = torch_build()
        hardware = detect()
        return [
            *package_checks(need, root),
            *gpu_checks(need, hardware, driver.result(), torch),
            *machine_checks(need, hardware),
            *sandbox_checks(),
            *line_end_checks(root),
            *key_checks(),
            *tracker_checks(),
            *cloud.result(),
        ]


def exit_code(checks: list[Check]) -> int:
    """1 if something needed is missing, else 0."""
    return EXIT_MISSING if any(check.status == "missing" for check in checks) else EXIT_OK


def render(checks: list[Check]) -> str:
    """The rows as aligned plain text, with the advice in the line below each row."""
    rows = [("", "check", "found", "needed"), *((c.status, c.name, c.found, c.needed) for c in checks)]
    first, *others = aligned(rows)
    lines, indent = [first], max(len(row[0]) for row in rows)
    for line, check in zip(others, checks, strict=True):
        lines.append(line)
        if check.advice:
            lines.append(f"{'':{indent}}  -> {check.advice}")
    count = sum(check.status == "missing" for check in checks)
    lines += ["", f"{count} missing" if count else "nothing required is missing"]
    return "\n".join(lines)


def sandbox_checks() -> Iterator[Check]:
    """The second layer of the SQL sandbox, as a worker that was started reports it; SQL is run without it, too."""
    name, needed = "SQL sandbox", "SQLite's own limits; better with Landlock and seccomp"
    try:
        with SqlSandbox() as sandbox:
            layers = sandbox.second_layer()
    except UserError as error:
        yield Check(name, "warning", "does not start", needed, str(error))
        return
    absent = [layer for layer in ("Landlock", "seccomp") if not any(found.startswith(layer) for found in layers)]
    found = ", ".join([*(f"{layer} on" for layer in layers), *(f"{layer} off" for layer in absent)])
    advice = (
        "only matters if a flaw in SQLite executes code: use a Linux kernel from 5.13 on that allows them"
        if absent
        else ""
    )
    yield Check(name, "info" if absent else "ok", found, needed, advice)


def line_end_checks(root: Path) -> Iterator[Check]:
    """Line ends of the checkout's scripts and Makefile: bash and make fail on Windows ones. No row if there are no such files."""
    scripts = [root / "Makefile", *sorted((root / "on_machine").glob("*.sh"))]
    bad = [path.relative_to(root) for path in with_carriage_returns(scripts)]
    if bad:
        what = f"CR LF in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        yield Check("line ends", "missing", what, "LF", f"run `{unix_line_ends_command(bad)}` in {root}")
    elif any(path.is_file() for path in scripts):
        yield Check("line ends", "ok", "LF", "LF")


def package_checks(need: Need, root: Path) -> Iterator[Check]:
    """Python and every package of the extras train and cloud, with minimum and pinned version."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        metadata = importlib.metadata.metadata(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        advice = f"run `{install_command('train', pinned=False)}`"
        yield Check(PROJECT, "missing", "not installed", "", advice)
        return
    yield _python_check(metadata["Requires-Python"] or "")
    pins = pinned_versions(root / "constraints.txt")
    for requirement in map(Requirement, metadata.get_all("Requires-Dist") or []):
        extra = next((e for e in ("", "train", "cloud") if _applies(requirement, e)), None)
        if extra is not None:
            pin = pins.get(canonicalize_name(requirement.name))
            check = package_check(requirement.name, str(requirement.specifier), pin, extra, need)
            yield _skypilot_as_imported(check, need, root) if requirement.name == "skypilot" else check


def _python_check(needed: str) -> Check:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    if SpecifierSet(needed).contains(found, prereleases=True):
        return Check("Python", "ok", found, needed)
    return Check("Python", "missing", found, needed, f"create a virtual environment with Python {needed}")


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def package_check(name: str, minimum: str, pin: str | None, extra: str, need: Need) -> Check:
    """The row of one package: its minimum ('>=2.11') and, if any, its pin ('2.13.0')."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    install = install_command(extra, pinned=pin is not None)
    needed = f"{minimum}, pinned {pin}" if pin else minimum
    absent = _absent(extra, need)
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        use = {"train": "train and evaluate", "cloud": "launch on Google Cloud", "": "run at all"}[extra]
        return Check(name, absent, "not installed", needed, f"to {use}: {install}")
    try:
        enough = SpecifierSet(minimum).contains(found, prereleases=True)
        pinned = pin is None or SpecifierSet(f"=={pin}").contains(found, prereleases=True)
    except InvalidVersion:
        enough = pinned = False
    if not enough:
        return Check(name, absent, found, needed, install)
    if not pinned:
        return Check(name, "warning", found, needed, f"not the version that was tested: {install}")
    return Check(name, "ok", found, needed)


def _skypilot_as_imported(check: Check, need: Need, root: Path) -> Check:
    """The row of skypilot, corrected by what `import sky` would find (it is not imported, which takes seconds).

    The folder of task YAMLs has the same name: without an __init__.py it makes the import succeed if SkyPilot is absent; with one
    it hides SkyPilot.
    """
    spec = importlib.util.find_spec("sky")
    origin = spec.origin if spec else None
    if origin and Path(origin).resolve().is_relative_to(root / "sky"):
        advice = "delete sky/__init__.py: it hides SkyPilot"
        return replace(check, status=_absent("cloud", need), found="hidden by sky/__init__.py", advice=advice)
    if spec and not origin:
        advice = check.advice or "install it again: its module `sky` is missing"
        found = f"{check.found} (import sky finds only the folder sky/)"
        return replace(check, status=_absent("cloud", need), found=found, advice=advice)
    return check


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Normalised name -> version from a constraints file; {} if there is none."""
    from packaging.utils import canonicalize_name

    if not constraints.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition(";")[0].strip().partition("==") for line in lines)
    return {canonicalize_name(name): version for name, equals, version in pairs if equals}


def gpu_checks(need: Need, hardware: Hardware, driver: Driver | None, torch: TorchBuild | None) -> Iterator[Check]:
    """GPU, dtype, driver and torch build, and whether they are compatible."""
    gpu = hardware.gpu or (driver.gpu if driver else None)
    if gpu is None:
        advice = "training runs on the CPU: fine for the demo, too slow for 7B; launch a GPU machine with `sky launch`"
        yield Check("GPU", "info", "none", "", advice)
    else:
        major, minor = gpu.compute_capability
        found = f"{gpu.count} x {gpu.name}, {gpu.memory_gib} GiB, compute capability {major}.{minor}"
        yield Check("GPU", "ok", found)
    yield Check("compute dtype", "ok", hardware.dtype, "bfloat16 from 8.0, float16 below, float32 on CPU")
    if driver and not driver.version:
        advice = "run `nvidia-smi` to see why: the driver is not loaded or does not match its kernel module"
        yield Check("NVIDIA driver", "warning", "nvidia-smi gives no answer", "", advice)
    elif driver:
        yield _driver_check(need, driver.version, torch.cuda if torch else None)
    if torch:
        yield _torch_check(need, gpu.compute_capability if gpu else None, torch)


def _driver_check(need: Need, version: str, cuda: str | None) -> Check:
    floor = DRIVER_FLOOR.get(int(cuda.split(".")[0])) if cuda else None
    branch = version.split(".")[0]
    if floor is None or (branch.isdigit() and int(branch) >= floor):
        return Check("NVIDIA driver", "ok", version, f">={floor} for CUDA {cuda}" if floor else "")
    advice = f"install driver {floor} or newer, or torch for CUDA 12 (drivers from {DRIVER_FLOOR[12]} on)"
    return Check("NVIDIA driver", _absent("train", need), version, f">={floor} for CUDA {cuda}", advice)


def _torch_check(need: Need, capability: tuple[int, int] | None, torch: TorchBuild) -> Check:
    name, found = "torch build", f"CUDA {torch.cuda}" if torch.cuda else "CPU only"
    absent = _absent("train", need)
    if torch.broken:
        return Check(name, absent, f"does not work: {torch.broken}", "", "reboot, or install torch again")
    if capability is None:
        return Check(name, "ok", found)
    code = f"sm_{capability[0]}{capability[1]}"
    volta = "a build for CUDA 12.6 (torch <= 2.14)"
    if torch.cuda is None:
        needed = volta if capability == VOLTA else "a CUDA build"
        return Check(name, absent, found, needed, f"install {needed}: choose it on pytorch.org/get-started")
    if not runs_on(torch, capability):
        needed = volta if capability == VOLTA else f"a build with {code}"
        return Check(name, absent, found, needed, f"this build has no code for {code}: install {needed}")
    if torch.gpu is None:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        advice = "unset CUDA_VISIBLE_DEVICES" if hidden else "see the row of the driver, or reboot"
        return Check(name, absent, f"{found}, finds no GPU", f"holds {code}", advice)
    return Check(name, "ok", found, f"holds {code}")


def machine_checks(need: Need, hardware: Hardware) -> Iterator[Check]:
    """CPU, memory, and free disk for runs and for downloaded models."""
    yield Check("platform", "ok", hardware.platform)
    yield Check("CPU", "ok", f"{hardware.cores} cores, {hardware.cpu}")
    enough = hardware.ram_gib >= RAM_GIB or need == "cloud"
    advice = "" if enough else "close other programs, or use a machine with at least 8 GB"
    yield Check("RAM", "ok" if enough else "warning", f"{hardware.ram_gib} GiB", "8 GB", advice)
    for name, folder in (("disk, this folder", Path.cwd()), ("disk, model cache", huggingface_home())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / GIB
        status: Status = "ok" if free >= DISK_GIB["7B"] or need == "cloud" else "warning"
        if free < DISK_GIB["demo"]:
            status = _absent("train", need)
        needed = f"{DISK_GIB['demo']:.0f} GiB for the demo, {DISK_GIB['7B']:.0f} for 7B (estimated)"
        advice = "free some space, or set HF_HOME and training.output_dir to a larger disk" if status != "ok" else ""
        yield Check(name, status, f"{free:.1f} GiB free", needed, advice)
