"""The weights of a base model as files, one tensor at a time: so a model that is larger than memory can be read and written.

Reading takes the files that transformers would take: model.safetensors, else those of its index, else pytorch_model.bin. Writing
makes safetensors files (their format: 8 bytes with the length of the header, the header as JSON, then the tensors' bytes), whose
sizes are known before the first tensor is, so that no shard is held in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from finetune.config.schema import ModelSection
from finetune.errors import UserError, first_line
from finetune.models.load import resolve_name
from finetune.runtime.confined import within
from finetune.runtime.files import disk_error, load_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in a safetensors header."""
PART_BYTES = 1 << 26
"""A tensor that is only copied is read in parts of about this size."""
MARGIN_BYTES = 1 << 26
"""Left free on the disk beside the weights: for the small files."""


class BaseWeights:
    """The tensors of a model folder, read one by one. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._found()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of the tensor, as it is in the file."""
        with self._open(name) as file:
            return file.get_tensor(name).clone()

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The same in parts of whole rows, for tensors that are only copied."""
        with self._open(name) as file:
            part = file.get_slice(name)
            shape = list(part.get_shape())
            if not shape:
                yield file.get_tensor(name).clone()
                return
            row = max(1, math.prod(shape[1:])) * 4
            step = max(1, PART_BYTES // row)
            for start in range(0, shape[0], step):
                yield part[start : start + step].clone()

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """The open file of a tensor. It is opened for each tensor: closing it gives back the memory of what was mapped."""
        path = self._files[name]
        try:
            if path.suffix == ".bin":
                yield _Pickled(path)
            else:
                with safe_open(path, framework="pt") as file:
                    yield file
        except (OSError, SafetensorError, RuntimeError, LookupError, EOFError) as error:
            raise self._fault(f"{path.name} is not readable ({first_line(error)})") from error

    def _found(self) -> dict[str, Path]:
        """The file of each tensor."""
        for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
            if (self.folder / single).is_file():
                return dict.fromkeys(self._names_in(self.folder / single), self.folder / single)
            if (self.folder / index).is_file():
                return self._of_index(self.folder / index)
        raise self._fault(f"neither {SINGLE} nor {INDEX}")

    def _names_in(self, path: Path) -> list[str]:
        try:
            if path.suffix == ".bin":
                return list(_Pickled(path).tensors)
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError, RuntimeError, EOFError) as error:
            raise self._fault(f"{path.name} is not readable ({first_line(error)})") from error

    def _of_index(self, index: Path) -> dict[str, Path]:
        try:
            listed = load_json(index)["weight_map"]
            found = {name: within(self.folder, file) for name, file in listed.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._fault(f"{index.name} is not readable ({first_line(error)})") from error
        for name, path in found.items():
            # a hub's cache consists of links, which lead out of the folder
            linked = self.folder / str(listed[name])
            if path is None and not (Path(str(listed[name])).name == listed[name] and linked.is_file()):
                raise self._fault(f"{index.name} names {str(listed[name])[:80]!r}, which is no file in it")
            found[name] = path or linked
        missing = sorted({path.name for path in found.values() if path is not None and not path.is_file()})
        if missing:
            raise self._fault(f"{missing[0]} is missing")
        return {name: path for name, path in found.items() if path is not None}

    def _fault(self, what: str) -> UserError:
        return UserError(
            f"model.name: {self.folder}: {what}; is the folder complete? Download the model again",
            code="model.incomplete",
        )


class _Pickled:
    """A pytorch_model.bin with the interface of safe_open; its tensors are mapped, not read, and no code in it is run."""

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> _Rows:
        return _Rows(self.tensors[name])


class _Rows:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._tensor[rows]


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, entries: Sequence[Entry], tensors: Iterable[Iterable[torch.Tensor]], shard_bytes: int
) -> list[str]:
    """Write safetensors files of about `shard_bytes` at most into a folder, and an index if there are several.

    tensors: for each entry in turn the tensor, in one part or several, which are joined along their first dimension. Returns the
    files' names. Raises UserError if the disk is full, before the first byte where the free room shows it.
    """
    shards = _shards(entries, shard_bytes)
    check_room(folder, sum(entry.bytes for entry in entries))
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    waiting = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        try:
            with (folder / name).open("wb") as file:
                _write_shard(file, shard, waiting)
        except OSError as error:
            raise disk_error(error, folder / name) from error
    if len(shards) > 1:
        total = sum(entry.bytes for entry in entries)
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        return [*names, INDEX]
    return names


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError unless the folder's disk has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on this disk; free some or choose "
            "another output folder",
            code="disk.full",
        )


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_shard(file: IO[bytes], shard: Sequence[Entry], tensors: Iterator[Iterable[torch.Tensor]]) -> None:
    file.write(_header(shard))
    for entry in shard:
        written = 0
        for part in next(tensors):
            assert part.dtype == entry.dtype, f"{entry.name}: {part.dtype}"
            written += file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert written == entry.bytes, f"{entry.name}: {written} bytes of {entry.bytes}"
    file.flush()
    os.fsync(file.fileno())


def _header(shard: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in shard:
        place = [start, start + entry.bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        start = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def model_folder(section: ModelSection) -> Path:
    """The folder with the files of a model: for a hub id that of the hub's cache, downloaded where it is not there.

    Raises UserError if the name is wrong, has no pinned revision, or the hub cannot be reached.
    """
    source = resolve_name(section.name)
    if Path(source).is_dir():
        return Path(source)
    if section.revision is None:
        raise UserError(
            f"model.revision: a hub model needs a pinned revision (the commit to load of {section.name})",
            code="model.no_revision",
        )
    from huggingface_hub import snapshot_download

    try:
        for weights in ([SINGLE, INDEX, "model-*.safetensors"], [PICKLED, PICKLED_INDEX, "pytorch_model-*.bin"]):
            patterns = ["*.json", "*.model", "*.jinja", "*.py", *weights]
            folder = Path(snapshot_download(source, revision=section.revision, allow_patterns=patterns))
            if any((folder / name).is_file() for name in weights[:2]):
                break
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.name: cannot download {section.name}: {first_line(error)} (is the hub reachable, and HF_TOKEN set if the "
            "model is gated?)",
            code="model.load_failed",
        ) from error
    return folder
