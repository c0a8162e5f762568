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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from finetune.config.schema import ModelSection
from finetune.errors import UserError, first_line
from finetune.models.source import resolve_name
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
_KINDS = {name: kind for kind, name in NAMES.items()}
PART_BYTES = 1 << 26
"""A tensor that is only copied is read in parts of about this size."""
MARGIN_BYTES = 1 << 26
"""Left free on the disk beside the weights: for the small files."""


class BaseWeights:
    """The tensors of a model folder, read one by one. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._found()
        self._headers: dict[Path, _Safetensors] = {}

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, as it is in the file."""
        return next(self._read(name, None))

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The same in parts of whole rows, each of about PART_BYTES: for tensors that are only copied."""
        yield from self._read(name, PART_BYTES)

    def _read(self, name: str, of_bytes: int | None) -> Iterator[torch.Tensor]:
        path = self._files[name]
        try:
            yield from self._file(path).parts(name, of_bytes)
        except (OSError, ValueError, SafetensorError, RuntimeError, LookupError, EOFError) as error:
            raise self._fault(f"{path.name} is not readable ({first_line(error)})") from error

    def _file(self, path: Path) -> _Pickled | _Safetensors:
        if path.suffix == ".bin":
            return _Pickled(path)
        if path not in self._headers:
            self._headers[path] = _Safetensors(path)
        return self._headers[path]

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
            return list((_Pickled if path.suffix == ".bin" else _Safetensors)(path).names)
        except (OSError, ValueError, SafetensorError, RuntimeError, EOFError) as error:
            raise self._fault(f"{path.name} is not readable ({first_line(error)})") from error

    def _of_index(self, index: Path) -> dict[str, Path]:
        try:
            listed = {name: str(file) for name, file in load_json(index)["weight_map"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._fault(f"{index.name} is not readable ({first_line(error)})") from error
        for file in sorted(set(listed.values())):
            # a plain name: the files of the hub's cache are links, which lead out of the folder
            if Path(file).name != file or not (self.folder / file).is_file():
                raise self._fault(f"{index.name} names {file[:80]!r}, which is no file in it")
        return {name: self.folder / file for name, file in listed.items()}

    def _fault(self, what: str) -> UserError:
        return UserError(
            f"model.name: {self.folder}: {what}; is the folder complete? Download the model again",
            code="model.incomplete",
        )


class _Safetensors:
    """A safetensors file, read with plain reads: what is mapped into memory (safe_open) counts as this process's memory, file by
    file, however little of it is used."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:  # checks the header, and that the file is as long as it says
            self.names = frozenset(file.keys())
        with path.open("rb") as plain:
            size = int.from_bytes(plain.read(8), "little")
            header = json.loads(plain.read(size))
        self._path, self._start, self._header = path, 8 + size, header

    def parts(self, name: str, of_bytes: int | None) -> Iterator[torch.Tensor]:
        entry = self._header[name]
        shape, kind = entry["shape"], _KINDS[entry["dtype"]]
        begin, end = entry["data_offsets"]
        row = max(1, math.prod(shape[1:]) * kind.itemsize)
        step = end - begin if of_bytes is None or not shape else max(1, of_bytes // row) * row
        with self._path.open("rb", buffering=0) as file:
            for place in range(begin, end, max(1, step)):
                content = bytearray(min(step, end - place))
                file.seek(self._start + place)
                if _read_into(file, content) < len(content):
                    raise EOFError("it ends too early")
                yield torch.frombuffer(content, dtype=kind).reshape(-1, *shape[1:])


class _Pickled:
    """A pytorch_model.bin with the same interface; its tensors are mapped, not read, and no code in it is run."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        self.names = frozenset(self._tensors)

    def parts(self, name: str, of_bytes: int | None) -> Iterator[torch.Tensor]:
        tensor = self._tensors[name]
        row = max(1, math.prod(tensor.shape[1:]) * tensor.element_size())
        step = len(tensor) if of_bytes is None else max(1, of_bytes // row)
        yield from (tensor[start : start + step].clone() for start in range(0, len(tensor), step))


def _read_into(file: IO[bytes], content: bytearray) -> int:
    view, done = memoryview(content), 0
    while done < len(content) and (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    return done


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
