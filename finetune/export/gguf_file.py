"""GGUF files of a merged model, written tensor by tensor: several quantisations in one pass, none through a file of 16 bits.

The weights are merged in float32 and rounded once, to the type of the file. Names, keys and the order of rotary dimensions are
those of llama.cpp's converter (conversion/llama.py, conversion/qwen.py), for the families of models/architectures.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import GGML_QUANT_VERSION

from finetune.errors import UserError
from finetune.export.gguf_tokenizer import add_tokenizer
from finetune.export.gguf_types import FILE_TYPES, byte_shape, quantised, type_of
from finetune.models.merging import MergedWeights
from finetune.models.weight_files import check_room
from finetune.runtime.files import disk_error

_ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
"""Name in llama.cpp by model_type."""
_ROTATED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
_ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(
    weights: MergedWeights, tokenizer: Any, files: Mapping[str, Path], *, name: str, chat_template: str | None = None
) -> None:
    """Write the model once for each quantisation (`FILE_TYPES`) of `files`, all in one pass over the weights, which are to be of
    float32. Raises UserError for a model or tokenizer that GGUF files of ours cannot hold, and for a full disk."""
    config = weights.config
    if config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"model.name: a model of the type {config.model_type!r} cannot be written as GGUF; known: "
            f"{', '.join(_ARCHITECTURES)}; export with --to merged",
            code="export.no_gguf",
        )
    plan = _planned(weights)
    tied = "output.weight" not in plan
    writers = {path: _Writer(path, quantization, weights, tied) for quantization, path in files.items()}
    first = next(iter(files.values()))
    check_room(first.parent, sum(writer.bytes_of(plan) for writer in writers.values()))
    try:
        for writer in writers.values():
            writer.begin(plan, tokenizer, name, chat_template)
        for gguf_name, values in _tensors(weights):
            for writer in writers.values():
                writer.add(gguf_name, values)
        for writer in writers.values():
            writer.end()
    except OSError as error:
        raise disk_error(error, first) from error


class _Writer:
    """One GGUF file."""

    def __init__(self, path: Path, quantization: str, weights: MergedWeights, tied: bool) -> None:
        self._path, self._quantization, self._weights, self._tied = path, quantization, weights, tied
        self._file = GGUFWriter(path, MODEL_ARCH_NAMES[_ARCHITECTURES[weights.config.model_type]])

    def _type(self, name: str, shape: tuple[int, ...]) -> Any:
        if name == _ROPE_FACTORS:
            return type_of(name, shape[:1], self._quantization, layers=0, tied=False)
        layers = self._weights.config.num_hidden_layers
        return type_of(name, shape, self._quantization, layers=layers, tied=self._tied)

    def bytes_of(self, plan: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(byte_shape(shape, self._type(name, shape))) for name, shape in plan.items())

    def begin(self, plan: Mapping[str, tuple[int, ...]], tokenizer: Any, name: str, chat_template: str | None) -> None:
        self._file.add_type("model")
        self._file.add_name(name)
        _add_dimensions(self._file, self._weights.config)
        self._file.add_file_type(FILE_TYPES[self._quantization])
        if self._quantization.startswith("q"):
            self._file.add_quantization_version(GGML_QUANT_VERSION)
        add_tokenizer(self._file, tokenizer, self._weights.config, plan["token_embd.weight"][0])
        if chat_template:
            self._file.add_chat_template(chat_template)
        for tensor, shape in plan.items():
            kind = self._type(tensor, shape)
            size = math.prod(byte_shape(shape, kind))
            # raw_dtype with a dtype of float32: the writer then takes the shape as that of the values
            self._file.add_tensor_info(tensor, shape, numpy.dtype(numpy.float32), size, raw_dtype=kind)
        self._file.write_header_to_file()
        self._file.write_kv_data_to_file()
        self._file.write_ti_data_to_file()

    def add(self, name: str, values: numpy.ndarray) -> None:
        self._file.write_tensor_data(quantised(values, self._type(name, values.shape)))

    def end(self) -> None:
        self._file.close()


def _planned(weights: MergedWeights) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by their names in GGUF, in the order in which they are written."""
    factors = _rope_factors(weights.config)
    extra = {} if factors is None else {_ROPE_FACTORS: factors.shape}
    return extra | {_renamed(weights, entry.name): entry.shape for entry in weights.entries}


def _tensors(weights: MergedWeights) -> Iterator[tuple[str, numpy.ndarray]]:
    factors = _rope_factors(weights.config)
    if factors is not None:
        yield _ROPE_FACTORS, factors
    for entry in weights.entries:
        values = weights.tensor(entry.name)
        if entry.name.endswith(_ROTATED) and _ARCHITECTURES[weights.config.model_type] == MODEL_ARCH.LLAMA:
            queries = ".q_proj." in entry.name
            values = _rotated(values, weights.config, queries=queries)
        yield _renamed(weights, entry.name), values.float().numpy()


def _renamed(weights: MergedWeights, name: str) -> str:
    config = weights.config
    names = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(
            f"model.name: GGUF has no name for the tensor {name} of a {config.model_type} model; export with --to merged",
            code="export.no_gguf",
        )
    return str(found)


def _rotated(values: torch.Tensor, config: Any, *, queries: bool) -> torch.Tensor:
    """The rows of a query or key projection in the order of llama.cpp's rotary embedding, which turns neighbours, where
    transformers turns the two halves of a head."""
    heads = config.num_attention_heads if queries else config.num_key_value_heads or config.num_attention_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_dimensions(file: GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(heads)
    file.add_head_count_kv(config.num_key_value_heads or heads)
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_rope_dimension_count(head_dim)
    file.add_vocab_size(config.vocab_size)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    file.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        scaling = RopeScalingType.LINEAR if rope["rope_type"] == "linear" else RopeScalingType.YARN
        file.add_rope_scaling_type(scaling)
        file.add_rope_scaling_factor(float(rope["factor"]))
        if scaling is RopeScalingType.YARN:
            file.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding. Raises UserError for a kind that llama.cpp would compute otherwise."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise UserError(
            f"model.name: GGUF files of ours do not know rotary embeddings of the type {rope['rope_type']!r}; export with --to "
            "merged",
            code="export.no_gguf",
        )
    return rope


def _rope_factors(config: Any) -> numpy.ndarray | None:
    """By what Llama 3.1 divides each frequency (transformers, modeling_rope_utils.py, llama3); None for others."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** (numpy.arange(0, head_dim, 2) / head_dim)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    positions = float(rope["original_max_position_embeddings"])
    smooth = (positions / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = numpy.where(lengths < positions / high, 1.0, numpy.where(lengths > positions / low, factor, between))
    return numpy.asarray(factors, dtype=numpy.float32)
