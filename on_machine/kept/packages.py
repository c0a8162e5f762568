"""Installed packages: an environment as it is on the disk, in parts that are fetched and unpacked side by side.

BUCKET/packages/<key>/manifest.json     the parts in a folder of one writer beside it, with their sizes and SHA-256

The key is a hash of what decides the installation (on_machine/setup.sh): pinned versions, build of PyTorch, driver, paths.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from on_machine.kept.manifests import (
    CHUNK,
    HOME,
    MANIFEST,
    NOT_THERE,
    STATE,
    STREAMS,
    Damaged,
    Json,
    is_inside,
    new_folder,
    note,
    prune,
    read_manifest,
    say,
    write_manifest,
)

KEPT = 4
"""Environments that stay in the bucket, the newest: those of training and of vLLM, of two versions."""
PART_BYTES = 1 << 27
PACKERS = {"zstd": "zstd -1 -q", "gzip": "gzip -1"}
"""Programs, the better one first, and how they pack: zstd unpacks six times as fast (measured); Ubuntu's images have it."""
SET_PIPE_BYTES, PIPE_BYTES = 1031, 1 << 20
"""Of Linux; fcntl names it from Python 3.10 on. 1 MiB is the most that a user may ask for: with 64 KiB, as by itself, each is a
switch between two processes."""


def fetch_packages(folder: Path, tree: str) -> int:
    """Unpacks the parts side by side in a folder of their own, then moves the trees to where they were on the first machine.

    tree: the environment that is expected, by its path in the home folder.
    """
    began = time.monotonic()
    manifest = read_manifest(folder)
    if manifest is None:
        return NOT_THERE
    trees = [str(one) for one in manifest["trees"]]
    python = Path(manifest["python"])
    if trees[0] != tree or not all(map(is_inside, trees)):
        raise Damaged(f"{folder}: holds {trees}, not {tree}")
    if not (python.exists() or any(HOME / one in python.parents for one in trees)):
        raise Damaged(f"{folder}: was made with {python}, which this machine lacks")
    part = STATE / f"packages.part-{os.getpid()}"
    part.mkdir()
    try:
        packer = manifest["packer"]
        if packer not in PACKERS or not shutil.which(packer):
            raise Damaged(f"{folder}: was packed with {packer}, which this machine lacks")
        with ThreadPoolExecutor(min(STREAMS, 2 * (os.cpu_count() or 1))) as pool:
            source = folder / manifest["folder"]
            for done in [pool.submit(unpack, source / row["name"], row, part, packer) for row in manifest["files"]]:
                done.result()
        for one in reversed(trees):
            move(part / one, HOME / one)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(row["bytes"] for row in manifest["files"])
    seconds = time.monotonic() - began
    note("packages_bytes", size)
    say(f"{tree} from the bucket: {size / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


def unpack(path: Path, row: Json, target: Path, packer: str) -> None:
    """Raises Damaged unless the part is the one of the manifest and tar takes all of it."""
    digest, size = hashlib.sha256(), 0
    tar = subprocess.Popen(
        ["tar", "-I", packer, "-xf", "-", "-C", target], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert tar.stdin and tar.stderr
    with suppress(OSError):
        fcntl.fcntl(tar.stdin, SET_PIPE_BYTES, PIPE_BYTES)
    try:
        with tar.stdin, path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                tar.stdin.write(chunk)
    except OSError as error:
        raise Damaged(f"{path}: {error}") from error
    finally:
        errors = tar.stderr.read().decode(errors="replace")
        tar.wait()
    if (size, digest.hexdigest()) != (row["bytes"], row["sha256"]):
        raise Damaged(f"{path}: not the bytes that its manifest lists")
    if tar.returncode:
        raise Damaged(f"{path}: {errors.strip()[-200:]}")


def move(source: Path, target: Path) -> None:
    """An environment that is there already is replaced; an interpreter stays, because another environment may run on it."""
    if target.exists():
        if not target.name.startswith("finetune-"):
            return
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def keep_packages(folder: Path, tree: str) -> None:
    """tree: an environment in the home folder, which is kept with its interpreter if that is in the home folder, too."""
    if (folder / MANIFEST).exists() or not (HOME / tree).is_dir():
        return
    began = time.monotonic()
    python = (HOME / tree / "bin" / "python").resolve()
    trees = [tree]
    if (
        HOME in python.parents and HOME / tree not in python.parents
    ):  # .local/share/uv/python/cpython-3.11.../bin/python3.11
        trees.append(str(python.parents[1].relative_to(HOME)))
    made = new_folder(folder)
    packer = next(name for name in PACKERS if shutil.which(name))
    rows = [pack(names, made / f"{number:03d}.tar.{packer}", packer) for number, names in enumerate(groups(trees))]
    about = {"folder": made.name, "files": rows, "trees": trees, "python": str(python), "packer": packer}
    write_manifest(folder, about)
    prune(folder.parent, KEPT)
    size = sum(row["bytes"] for row in rows)
    say(f"{tree} kept: {size / 1e9:.2f} GB in {folder}, {time.monotonic() - began:.0f} s")


def groups(trees: list[str]) -> Iterator[list[str]]:
    """The files of the trees in parts of about PART_BYTES, by names relative to the home folder."""
    names: list[str] = []
    size = 0
    for path in (path for tree in trees for path in sorted((HOME / tree).rglob("*"))):
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            continue
        names.append(str(path.relative_to(HOME)))
        size += path.lstat().st_size
        if size >= PART_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def pack(names: list[str], path: Path, packer: str) -> Json:
    command = ["tar", "-C", str(HOME), "--no-recursion", "--null", "-I", PACKERS[packer], "-T", "-", "-cf", "-"]
    tar = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert tar.stdin and tar.stdout
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as beside:  # tar may write before it has read all names
        listed = beside.submit(_feed, tar.stdin, "\0".join(names).encode())
        with path.open("wb", buffering=0) as file:
            while chunk := tar.stdout.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        listed.result()
    if tar.wait():
        raise Damaged(f"{path}: tar ended with {tar.returncode}")
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _feed(pipe: IO[bytes], content: bytes) -> None:
    with pipe:
        pipe.write(content)
