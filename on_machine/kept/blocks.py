"""Large files to and from the bucket in blocks, each with a SHA-256, so that they are read and checked side by side.

A manifest has a row for each: {"name": ..., "bytes": ..., "blocks": [SHA-256, ...]}.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from on_machine.kept.manifests import CHUNK, STREAMS, Damaged, Json

BLOCK_BYTES = 1 << 27


@contextmanager
def fetched(source: Path, rows: list[Json], target: Path) -> Iterator[Path]:
    """A folder beside `target` with the files, when every block is right; what is left in it is deleted. Raises Damaged."""
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        for row in rows:
            (part / row["name"]).parent.mkdir(parents=True, exist_ok=True)
            with (part / row["name"]).open("wb") as file:
                file.truncate(row["bytes"])
        blocks = [(row, number) for row in rows for number in range(len(row["blocks"]))]
        with ThreadPoolExecutor(STREAMS) as pool:
            for one in [pool.submit(_fetch_block, source, part, row, number) for row, number in blocks]:
                one.result()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch_block(source: Path, target: Path, row: Json, number: int) -> None:
    path, start = source / row["name"], number * BLOCK_BYTES
    left = min(BLOCK_BYTES, row["bytes"] - start)
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file, (target / row["name"]).open("r+b", buffering=0) as copy:
            file.seek(start)
            copy.seek(start)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
    except OSError as error:
        raise Damaged(f"{path}: {error}") from error
    if left or digest.hexdigest() != row["blocks"][number]:
        raise Damaged(f"{path}: not the bytes that its manifest lists")


def keep_files(source: Path, target: Path) -> list[Json]:
    """All files of a folder into one of the bucket. Returns the rows of its manifest."""
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    return [_keep_file(source / name, target / name, name) for name in names]


def size_of(rows: list[Json]) -> int:
    """Bytes."""
    return sum(int(row["bytes"]) for row in rows)


def _keep_file(source: Path, target: Path, name: str) -> Json:
    blocks, size, left = [], 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        while not left:  # until a block is not full
            digest, left = hashlib.sha256(), BLOCK_BYTES
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
            if left < BLOCK_BYTES:
                blocks.append(digest.hexdigest())
                size += BLOCK_BYTES - left
    return {"name": name, "bytes": size, "blocks": blocks}
