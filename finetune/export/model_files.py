"""Writes the files of an export into a folder: what each kind consists of besides its manifest and card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.export.templates import chat_template, modelfile
from finetune.models.adapter import SETTINGS, seal_adapter
from finetune.models.end_tokens import end_tokens
from finetune.models.load import load_model_config, load_tokenizer
from finetune.models.merging import Base, MergedWeights, write_weights
from finetune.models.positions import positions
from finetune.models.source import resolve_name
from finetune.models.weight_files import model_folder
from finetune.run_folder import RunFolder
from finetune.runtime.files import disk_error, read_json, write_json, write_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OLLAMA_CONTEXT = 8192
"""Tokens of context in a Modelfile, where the model has that many: Ollama's own default cuts a large schema off."""
_COPIED = ("adapter_*", "tokenizer*", "special_tokens_map.json", "prompt.json", "base.json")


@dataclass(frozen=True)
class Made:
    """What was written, for the manifest. base: that was merged into; adapter exports keep it apart."""

    base: Base | Literal["apart"]
    dtype: str | None
    gguf: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """What all kinds need to know of a run's model. trained_dtype: of training's computation."""

    run: RunFolder
    config: RunConfig
    template: PromptTemplate
    tokenizer: Any
    settings: Any
    end_ids: list[int]
    trained_dtype: torch.dtype

    @classmethod
    def of(cls, run: RunFolder, config: RunConfig, template: PromptTemplate) -> Model:
        """Raises UserError if the base model or its tokenizer cannot be loaded."""
        tokenizer, settings = load_tokenizer(config.model), load_model_config(config.model)
        tokenizer.chat_template = chat_template(template)
        ends = end_tokens(config.model, tokenizer, settings)
        hardware = run.record().hardware if run.run_json.is_file() else None
        trained = DTYPES.get((hardware.dtype if hardware else None) or "", torch.float32)
        return cls(run, config, template, tokenizer, settings, ends, trained)

    @property
    def context_tokens(self) -> int | None:
        return positions(self.settings)


def write_merged(model: Model, folder: Path, *, base: Base, dtype: str | None) -> Made:
    """A folder that transformers, vLLM and others load. dtype: None for that of training."""
    chosen = DTYPES[dtype] if dtype else model.trained_dtype
    written = write_weights(
        model.config,
        folder,
        adapter=model.run.adapter,
        base=base,
        dtype=chosen,
        trained_dtype=model.trained_dtype,
    )
    _save_tokenizer(model, folder)
    _save_generation_config(model, folder)
    if model.config.model.trust_remote_code:
        for path in model_folder(model.config.model).glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    return Made(written.base, str(chosen).removeprefix("torch."), {})


def write_gguf_files(model: Model, folder: Path, *, base: Base, quantizations: tuple[str, ...]) -> Made:
    """GGUF files, and a Modelfile for each."""
    from finetune.export.gguf_file import write_gguf

    weights = MergedWeights.of(
        model.config,
        adapter=model.run.adapter,
        base=base,
        dtype=torch.float32,
        trained_dtype=model.trained_dtype,
    )
    names = {name: f"model-{name}.gguf" for name in quantizations}
    files = {name: folder / file for name, file in names.items()}
    title = model.run.path.resolve().name
    write_gguf(weights, model.tokenizer, files, name=title, chat_template=chat_template(model.template))
    context = min(model.context_tokens or OLLAMA_CONTEXT, OLLAMA_CONTEXT)
    for number, (name, file) in enumerate(names.items()):
        text = modelfile(
            model.template,
            file,
            max_new_tokens=model.config.evaluation.max_new_tokens,
            context_tokens=context,
        )
        write_text(folder / ("Modelfile" if not number else f"Modelfile.{name}"), text)
    _save_tokenizer(model, folder)
    return Made(weights.base, None, names)


def write_adapter(model: Model, folder: Path) -> Made:
    """The adapter as PEFT and vLLM load it."""
    source = model.run.adapter
    try:
        for pattern in _COPIED:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise disk_error(error, folder) from error
    settings = read_json(folder / SETTINGS, "finetune train CONFIG")
    settings["base_model_name_or_path"] = resolve_name(model.config.model.name)
    settings["revision"] = model.config.model.revision
    settings["inference_mode"] = True
    write_json(folder / SETTINGS, settings)
    seal_adapter(folder)
    return Made("apart", None, {})


def _save_tokenizer(model: Model, folder: Path) -> None:
    try:
        model.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    model.template.save(folder)


def _save_generation_config(model: Model, folder: Path) -> None:
    """Greedy answers that end where those of the evaluation end, apart from its rules about the text."""
    from transformers import GenerationConfig

    defaults = GenerationConfig(
        do_sample=False,
        max_new_tokens=model.config.evaluation.max_new_tokens,
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=model.end_ids,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    try:
        defaults.save_pretrained(folder)
    except OSError as error:
        raise disk_error(error, folder) from error


def check_tokens(file: Path, model: Model, prompts: list[str]) -> None:
    """Raises UserError if llama.cpp reads one of the prompts as other token ids than training did."""
    from finetune.export.gguf_tokenizer import differing
    from finetune.models.llama_cpp import LlamaServer

    with LlamaServer(file, context_tokens=256, parallel=1) as server:
        other = differing(server, model.tokenizer, prompts)
    if other:
        raise UserError(
            f"{file.name}: llama.cpp reads this prompt as other tokens than training did: {other[-200:]!r}; export with --to "
            "merged",
            code="export.other_tokens",
        )
