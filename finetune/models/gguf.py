"""A model from a GGUF file in an installed Python package, converted once to a folder that transformers can load."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from finetune.errors import UserError, first_line
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import disk_error, sha256_file
from finetune.runtime.installed import weights_command
from finetune.runtime.paths import cache_root

PACKAGE_PREFIX = "package://"


def cache_folder() -> Path:
    """Where converted models are cached."""
    return cache_root() / "models"


def unpacked_gguf(name: str) -> Path:
    """A folder of float32 safetensors from the GGUF file inside an installed package; made once and cached.

    Raises UserError if the package or file does not exist, or the folder cannot be written.
    """
    module, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name: {name}: the package {module} is not installed; run `{weights_command(module)}`",
            code="install.missing_package",
        )
    gguf = Path(next(iter(spec.submodule_search_locations))) / file
    if gguf.suffix != ".gguf" or not gguf.is_file():
        raise UserError(f"model.name: {name}: no GGUF file {file!r} in the package {module}", code="model.not_found")
    target = cache_folder() / f"{gguf.stem}-{sha256_file(gguf)[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpacking-"))
        try:
            _unpack_gguf(gguf, temporary)
            os.replace(temporary, target)
        finally:
            remove_tree(temporary, inside=target.parent, ignore_errors=True)
    except OSError as error:
        if not (target / "config.json").is_file():  # else another process was faster
            raise disk_error(error, target) from error
    except SafetensorError as error:  # safetensors raises it for a full disk, too
        raise UserError(f"{target}: cannot be written: {first_line(error)}", code="model.unpacking_failed") from error
    return target


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF metadata of the tokenizer wrongly names <|im_start|> as its end; the model's config is right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # else decoding would remove spaces from SQL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
