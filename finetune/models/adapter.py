"""The adapter folder: a manifest that seals it, and the checks before it is loaded.

The manifest is written last, with size and SHA-256 of every file. An adapter without one (of an earlier version) is loaded after
all other checks, with a note. base.json identifies the weights that the adapter was trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import LoraSection
from finetune.errors import UserError, first_line
from finetune.runtime.files import disk_error, load_json, parse_json, read_text, sha256_file, write_json

MANIFEST, BASE = "manifest.json", "base.json"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSEALED = (MANIFEST, "README.md")
"""Files that may change: the model card says nothing that is loaded."""
FREE = ("r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "peft_version",
        "inference_mode", "task_type")  # fmt: skip
"""Settings of PEFT's LoraConfig that differ between adapters of ours; all others have PEFT's defaults. With another value
(use_dora, rank_pattern, layer_replication, modules_to_save, init_lora_weights: pissa ...) an adapter computes something that
training here never did, or has changed the base weights."""
_OPTIONAL = {"base_model_name_or_path": str, "revision": str, "peft_version": str, "inference_mode": bool}
"""Free settings that may also be missing or null."""
_SAMPLE = 2**20
"""Bytes read at the beginning, in the middle and at the end of a file of weights."""


def seal_adapter(folder: Path) -> None:
    """Write the manifest of a complete adapter folder. Raises UserError for a disk error."""
    try:
        names = sorted(path.name for path in folder.iterdir() if _is_sealed_file(path))
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names
        }
    except OSError as error:
        raise disk_error(error, folder) from error
    write_json(folder / MANIFEST, {"files": files})


def _is_sealed_file(path: Path) -> bool:
    return path.is_file() and path.name not in UNSEALED and not path.name.startswith(".")


def is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def check_folder(folder: Path) -> dict[str, Any]:
    """The adapter's settings, after all checks that need no model. Raises UserError."""
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder}: no adapter in it; run `finetune train` to the end, or name another run", code="adapter.missing"
        )
    if (folder / MANIFEST).exists():
        _check_seal(folder)
    try:
        settings = parse_json(read_text(folder / SETTINGS), nan=True)
    except (OSError, ValueError) as error:
        raise mismatch(folder, f"{SETTINGS} is not readable as JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        raise mismatch(folder, f"{SETTINGS} is not a JSON object")
    _check_settings(folder, settings)
    return settings


def check_run(folder: Path, settings: Mapping[str, Any], lora: LoraSection) -> None:
    """Raises UserError if the adapter was trained with other LoRA settings than the run's."""
    for key, value in (("r", lora.r), ("lora_alpha", lora.lora_alpha)):
        if settings[key] != value:
            raise UserError(
                f"{folder / SETTINGS}: {key} is {settings[key]!r}, but this run has lora.{key}: {value}; restore the file that "
                "training wrote, or config.yaml",
                code="adapter.other_run",
            )


def check_tensors(folder: Path, loaded: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError unless the folder's file has exactly the adapter tensors of a model, all of them finite. loaded: the
    adapter tensors of the model after loading, by the names of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            _check_names(folder, names, set(loaded))
            for name in sorted(names):
                _check_tensor(folder, name, file.get_tensor(name), loaded[name])
    except (OSError, SafetensorError) as error:
        raise mismatch(folder, f"{WEIGHTS}: {first_line(error)}") from error


def check_layers(folder: Path, wanted: set[str], adapted: set[str]) -> None:
    """Raises UserError unless exactly the layers that lora.target_modules matches have an adapter."""
    if wanted == adapted:
        return
    name = sorted(wanted ^ adapted)[0]
    what = "has no adapter for" if name in wanted else "has an adapter for"
    raise UserError(
        f"{folder / SETTINGS}: {what} {name}, other than lora.target_modules of this run; restore the file that training "
        "wrote, or config.yaml",
        code="adapter.other_run",
    )


def base_identity(name: str, revision: str | None, folder: Path | None) -> dict[str, Any]:
    """What identifies the weights of a base model: name and revision of a hub id, else a hash over samples of every file of
    weights in the folder, whatever its name."""
    if folder is None:
        return {"name": name, "revision": revision}
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return {"name": name, "weights": digest.hexdigest()}


def check_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Raises UserError if the adapter was trained on other weights than those of `base`; an adapter of an earlier version does
    not say. A hub id cannot be compared with a folder."""
    if not (folder / BASE).is_file():
        return
    try:
        trained = load_json(folder / BASE)
    except (OSError, ValueError) as error:
        raise mismatch(folder, f"{BASE} is not readable as JSON ({first_line(error)})") from error
    if not isinstance(trained, dict):
        raise mismatch(folder, f"{BASE} is not a JSON object")
    keys = ("weights",) if "weights" in trained else ("name", "revision")
    if trained.keys() >= set(keys) and base.keys() == trained.keys() and any(trained[key] != base[key] for key in keys):
        raise UserError(
            f"{folder}: was trained on other weights than those of model.name {base['name']}; use the base model that it was "
            "trained on",
            code="adapter.other_base",
        )


def mismatch(folder: Path, why: str) -> UserError:
    return UserError(f"{folder}: the adapter does not load on this base model: {why}", code="adapter.mismatch")


def _check_seal(folder: Path) -> None:
    def changed(what: str) -> UserError:
        return UserError(
            f"{folder}: {what} since training wrote it; take the adapter folder from the run's bucket, or train again",
            code="adapter.changed",
        )

    try:
        files = load_json(folder / MANIFEST)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise changed(f"{MANIFEST} has changed") from None
    if not {SETTINGS, WEIGHTS} <= expected.keys():
        raise changed(f"{MANIFEST} has changed")
    for name, (size, sha256) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise changed(f"{name!r} has been removed")
        try:
            if path.stat().st_size != size or sha256_file(path) != sha256:
                raise changed(f"{name} has changed")
        except OSError as error:
            raise disk_error(error, path) from error


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig

    def unsupported(key: str, value: object) -> UserError:
        return UserError(
            f"{folder / SETTINGS}: {key}: {str(value)[:80]!r} is not of an adapter that `finetune train` writes; restore the "
            "file that training wrote",
            code="adapter.unsupported",
        )

    usual = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for key in ("peft_type", "task_type"):
        if settings.get(key) != usual[key]:
            raise unsupported(key, settings.get(key))
    for key, value in settings.items():
        if key not in FREE and value != usual.get(key) and (value or usual.get(key)):
            raise unsupported(key, value)
    r, alpha, targets = (settings.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(r) is not int or r < 1:
        raise unsupported("r", r)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise unsupported("lora_alpha", alpha)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise unsupported("target_modules", targets)
    dropout = settings.get("lora_dropout", 0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise unsupported("lora_dropout", dropout)
    for key, kind in _OPTIONAL.items():
        if not isinstance(settings.get(key), kind | None):
            raise unsupported(key, settings[key])


def _check_names(folder: Path, saved: set[str], needed: set[str]) -> None:
    for names, what in ((needed - saved, "lacks"), (saved - needed, "has foreign")):
        if names:
            first, *more = sorted(names)
            others = f" and {len(more)} more" if more else ""
            raise mismatch(
                folder, f"{WEIGHTS} {what} tensors: {first}{others}; of {len(needed)} that this adapter needs"
            )


def _check_tensor(folder: Path, name: str, saved: torch.Tensor, loaded: torch.Tensor) -> None:
    if saved.shape != loaded.shape:
        raise mismatch(folder, f"{WEIGHTS}: {name} is {list(saved.shape)} instead of {list(loaded.shape)}")
    if not saved.is_floating_point():
        raise mismatch(folder, f"{WEIGHTS}: {name} holds {saved.dtype}, not numbers with a fraction")
    if not torch.isfinite(saved).all():
        raise mismatch(folder, f"{WEIGHTS}: {name} holds values that are not finite")
    if not torch.equal(saved, loaded.detach().to("cpu", saved.dtype)):
        raise mismatch(folder, f"{WEIGHTS}: {name} was not loaded as it is in the file")
