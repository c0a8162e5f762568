"""The folder of an export: its manifest export.json, and how `serve` and `ask` read it.

The manifest is written last, into a folder of another name (`<name>.part`), which is then renamed: a folder with a manifest is
whole. It lists size and SHA-256 of every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.config.schema import QuantizationSection
from finetune.data.prompts import PROMPT_FILE, PromptTemplate, load_template
from finetune.errors import UserError, first_line, shown
from finetune.runtime.confined import within
from finetune.runtime.files import load_json, sha256_file

MANIFEST = "export.json"
FORMAT = 1
Kind = Literal["merged", "adapter", "gguf"]
KINDS: tuple[Kind, ...] = ("merged", "adapter", "gguf")


@dataclass(frozen=True)
class Export:
    """A complete export.

    model: what a program loads: the folder (merged, adapter) or the GGUF file. gguf: all GGUF files by quantization, empty for
    other kinds. end_ids: the tokens that end an answer. context_tokens: the model's positions, None without a limit.
    base: which base weights were merged into, dequantized or original; dtype: of the weights, or the quantization.
    """

    path: Path
    kind: Kind
    model: Path
    base: str
    dtype: str
    template: PromptTemplate
    gguf: Mapping[str, Path]
    end_ids: tuple[int, ...]
    max_new_tokens: int
    context_tokens: int | None
    base_model: str
    base_revision: str | None
    manifest: Mapping[str, Any]

    @property
    def dialects(self) -> tuple[str, ...]:
        return self.template.dialects


def is_export(path: Path) -> bool:
    """Whether there is an export folder, complete or damaged."""
    return (path / MANIFEST).is_file()


def open_export(path: Path, quantization: str | None = None, *, verify: bool = False) -> Export:
    """Read an export folder. quantization: of its GGUF files, the first without it. verify: also compare the SHA-256 of every
    file, which takes a second for each GB or two.

    Raises UserError if it is no export, was cut short or changed, is of a later version, or lacks the quantization.
    """
    manifest = read_manifest(path)
    check_files(path, manifest["files"], verify=verify)
    gguf = {name: path / str(file) for name, file in manifest["gguf"].items()}
    if quantization is not None and quantization not in gguf:
        there = f"it has {', '.join(gguf)}" if gguf else "it holds no GGUF file"
        raise UserError(f"{path}: no quantization {shown(quantization)}; {there}", code="export.no_quantization")
    dtype = (quantization or next(iter(gguf))) if gguf else str(manifest["dtype"])
    return Export(
        path=path,
        kind=manifest["kind"],
        model=gguf[dtype] if gguf else path,
        base=str(manifest["base"]),
        dtype=dtype,
        template=load_template(path),
        gguf=gguf,
        end_ids=tuple(manifest["end_ids"]),
        max_new_tokens=manifest["max_new_tokens"],
        context_tokens=manifest["context_tokens"],
        base_model=manifest["base_model"]["name"],
        base_revision=manifest["base_model"]["revision"],
        manifest=manifest,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """export.json, with the keys that are read later. Raises UserError."""
    try:
        manifest = load_json(path / MANIFEST)
    except FileNotFoundError:
        part = f"; {path.name}.part beside it is unfinished" if path.with_name(f"{path.name}.part").is_dir() else ""
        raise UserError(
            f"{path}: no {MANIFEST} in it, so it is not an export{part}; run `finetune export RUN` to make one",
            code="export.missing",
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST} is not readable ({first_line(error)})") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, f"{MANIFEST} is not a JSON object")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path / MANIFEST}: format {shown(manifest.get('format'))} is not that of this version ({FORMAT}); export again",
            code="export.other_version",
        )
    if fault := _fault(manifest):
        raise _damaged(path, f"{MANIFEST}: {fault}")
    return manifest


def check_files(path: Path, files: Mapping[str, Any], *, verify: bool) -> None:
    """Raises UserError unless every file is there with its size and, with `verify`, its content."""
    for name, entry in files.items():
        file = within(path, name)
        if file is None or not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != entry["bytes"] or (verify and sha256_file(file) != entry["sha256"]):
            raise _damaged(path, f"{name} has changed since it was exported")


def _fault(manifest: Mapping[str, Any]) -> str:
    """What is wrong with the keys that are read; "" if nothing is."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "kind": str,
        "base": str,
        "dtype": (str, type(None)),
        "base_model": dict,
        "gguf": dict,
        "end_ids": list,
        "max_new_tokens": int,
        "context_tokens": (int, type(None)),
        "files": dict,
        "key": str,
        "run": str,
        "quantization": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key, ...), kind):
            return f"{key} is {shown(manifest.get(key))}"
    for key in ("max_new_tokens", "context_tokens"):
        if manifest[key] is not None and (isinstance(manifest[key], bool) or manifest[key] < 1):
            return f"{key} is {shown(manifest[key])}"
    if manifest["kind"] not in KINDS or (manifest["kind"] == "gguf") != bool(manifest["gguf"]):
        return f"kind is {shown(manifest['kind'])}"
    base = manifest["base_model"]
    if not isinstance(base.get("name"), str) or not isinstance(base.get("revision", ...), str | None):
        return "base_model lacks name or revision"
    if not all(isinstance(token, int) and token >= 0 for token in manifest["end_ids"]):
        return "end_ids are not numbers of tokens"
    if not all(isinstance(file, str) and file in manifest["files"] for file in manifest["gguf"].values()):
        return "gguf names a file that is not listed"
    if PROMPT_FILE not in manifest["files"]:
        return f"files: {PROMPT_FILE} is not listed"
    if fault := _quantization_fault(manifest["quantization"]):
        return f"quantization: {fault}"
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            return f"files: {shown(name)} has no size and hash"
    return ""


def _quantization_fault(given: Mapping[str, Any]) -> str:
    """What no config's section quantization could be; "" if nothing is."""
    known = asdict(QuantizationSection())
    for key, value in given.items():
        if key not in known or type(value) is not type(known[key]):
            return f"{shown(key)} is {shown(value)}"
    return ""


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; remove the folder and export again", code="export.damaged")
