"""Where a model comes from: what a name in a config means, what identifies its weights, transformers' loaders with our errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from finetune.config.schema import ModelSection
from finetune.errors import UserError, first_line
from finetune.models.adapter import base_identity
from finetune.models.gguf import PACKAGE_PREFIX, unpacked_gguf
from finetune.runtime.hub_reason import hub_reason

_ATTENTION = re.compile(r"flash.?attention|flash_attn|attn_implementation|attention implementation", re.IGNORECASE)
"""In what transformers says of an attention that it cannot load a model with: a package is missing, a class does not have it."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve_name(name: str) -> str:
    """A hub id or folder that transformers can load; `package://module/file.gguf` is first converted into a cache folder.

    Raises UserError for a name that is none of these, and for an incomplete folder.
    """
    if name.startswith(PACKAGE_PREFIX):
        return str(unpacked_gguf(name))
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.name: {name} has no config.json, so it is not a model folder", code="model.incomplete"
            )
        if not any(found for pattern in WEIGHT_FILES for found in folder.glob(pattern)):
            raise UserError(
                f"model.name: {name} has no weights (expected {WEIGHT_FILES[0]} files)", code="model.incomplete"
            )
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model.name: no folder {name}; expected a local folder, a hub id such as mistralai/Mistral-7B-v0.1, "
                        f"or {PACKAGE_PREFIX}<module>/<file>.gguf", code="model.not_found")  # fmt: skip
    return name


def weights_identity(section: ModelSection) -> list[Any]:
    """Identifies the weights of a model without loading them: by the pinned revision of a hub id, the content hash in the name
    of a converted package, else name, size and modification time (ns) of every file in the folder."""
    folder = Path(resolve_name(section.name))
    if not folder.is_dir():
        return [section.name, section.revision]
    if section.name.startswith(PACKAGE_PREFIX):
        return [folder.name]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def identity_of_base(section: ModelSection) -> dict[str, Any]:
    """See adapter.base_identity. A converted package has the hash of its content in its folder's name."""
    source = resolve_name(section.name)
    if section.name.startswith(PACKAGE_PREFIX):
        return base_identity(section.name, Path(source).name, None)
    return base_identity(section.name, section.revision, Path(source) if Path(source).is_dir() else None)


def load_with(loader: Any, section: ModelSection, source: str | None = None, **arguments: Any) -> Any:
    """Call a `from_pretrained` for the model that a config names, or for another folder (source). Raises UserError if the name is
    wrong, files are missing or corrupt, or the hub cannot be reached."""
    source = source or resolve_name(section.name)
    hub = not Path(source).exists()
    if hub and section.revision is None:
        raise UserError(
            f"model.revision: a hub model needs a pinned revision (the commit to load of {section.name})",
            code="model.no_revision",
        )
    from huggingface_hub.errors import StrictDataclassError  # for a value of the wrong type in config.json

    try:
        return loader(
            source,
            revision=section.revision if hub else None,
            trust_remote_code=section.trust_remote_code,
            **arguments,
        )
    except (
        OSError,
        ValueError,
        ImportError,
        LookupError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        why, advice = first_line(error), "check its files" if hub else "is the folder complete?"
        if (
            section.attn_implementation != "auto"
            and "attn_implementation" in arguments
            and _ATTENTION.search(str(error))
        ):
            raise UserError(
                f"model.attn_implementation: {section.attn_implementation} cannot be used for {section.name}: {why}; use auto",
                code="model.attention",
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            advice = "4-bit weights need the least memory: quantization.load_in_4bit=true"
        elif hub and isinstance(error, OSError) and "not a valid JSON" not in why:  # a file is missing, not damaged
            why, advice = hub_reason(section.name, section.revision, "model") or (why, advice)
        raise UserError(
            f"model.name: cannot load {section.name}: {why} ({advice})", code="model.load_failed"
        ) from error
