"""Merges an adapter into its base weights, tensor by tensor from safetensors to safetensors: memory holds one tensor at a time,
however large the model is.

Which base it is merged into is a choice. `dequantized`: the values that the adapter was trained on, which are the 4-bit weights
of training (or without quantization those of the file), in the dtype of training. `original`: those of the file, of higher
precision than what the adapter has seen. Each layer is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.config.schema import QuantizationSection, RunConfig
from finetune.errors import UserError, first_line
from finetune.models.adapter import WEIGHTS, check_base, check_folder, check_layers, check_run, mismatch
from finetune.models.load import layers_with_adapter, load_model_config
from finetune.models.source import identity_of_base
from finetune.models.weight_files import BaseWeights, Entry, model_folder, write_shards

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Base = Literal["dequantized", "original"]
SHARD_BYTES = 4 * 10**9
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Written:
    """What was written. files: names in the folder. bytes: of the weights. layers: with an adapter. base: that it was merged
    into; `original` also where the run has no 4-bit weights."""

    files: list[str]
    bytes: int
    layers: int
    base: Base


def write_weights(
    config: RunConfig,
    folder: Path,
    *,
    adapter: Path | None,
    base: Base = "dequantized",
    dtype: torch.dtype,
    trained_dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the base model of a config, with the adapter of a folder merged in if there is one, into an existing folder: weights
    in `dtype` and config.json, which comes last; no tokenizer. The others, and the errors, as in `MergedWeights.of`; also raises
    UserError if the disk is full."""
    weights = MergedWeights.of(config, adapter=adapter, base=base, dtype=dtype, trained_dtype=trained_dtype)
    entries = weights.entries
    files = write_shards(folder, entries, (weights.parts(entry.name) for entry in entries), shard_bytes)
    weights.config.save_pretrained(folder)
    written = sum(entry.bytes for entry in entries)
    return Written([*files, "config.json"], written, weights.layers, weights.base)


@dataclass(frozen=True)
class MergedWeights:
    """The tensors of a base model with an adapter merged in, each computed when it is asked for.

    config: of the merged model. base: what it is merged into. entries: the tensors, in the order of the model. packed: the layers
    whose weight training held in 4 bits. compute: the dtype into which training cast the weights; None for that of the file.
    """

    config: PretrainedConfig
    base: Base
    entries: list[Entry]
    dtype: torch.dtype
    _weights: BaseWeights
    _deltas: _Deltas
    _packed: set[str]
    _quantization: QuantizationSection
    _compute: torch.dtype | None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        adapter: Path | None,
        base: Base = "dequantized",
        dtype: torch.dtype,
        trained_dtype: torch.dtype | None = None,
    ) -> MergedWeights:
        """The weights of a config's base model in `dtype`, with the adapter of a folder merged in if there is one.

        trained_dtype: the compute dtype of training, in which the base weights were quantised; None for `dtype`. Computes on a
        GPU if there is one, as training did. Raises UserError if the adapter is not of this base model, or if files are missing
        or damaged; `parts` does so if a merged value is out of the range of `dtype`.
        """
        deltas = _Deltas.read(adapter, config) if adapter is not None else _Deltas({}, 1.0)
        model_config = load_model_config(config.model)
        _refuse_quantized(config, model_config)
        skeleton = _skeleton(model_config, config.model.trust_remote_code)
        weights = BaseWeights(model_folder(config.model))
        names = _names(skeleton, weights)
        if adapter is not None:
            _check_adapted(skeleton, deltas, adapter, config)
        in_4bit = config.quantization.load_in_4bit
        packed = _quantized_layers(skeleton, config.quantization) if base == "dequantized" and in_4bit else set()
        model_config.dtype = dtype
        model_config.architectures = [type(skeleton).__name__]
        tied = skeleton.all_tied_weights_keys
        if tied and tied.keys() <= names.keys():  # tied by the config, and yet different in the file
            model_config.tie_word_embeddings = False
        return cls(
            config=model_config,
            base="dequantized" if packed else "original",
            entries=[_entry(name, tensor, dtype) for name, tensor in names.items()],
            dtype=dtype,
            _weights=weights,
            _deltas=deltas,
            _packed=packed,
            _quantization=config.quantization,
            _compute=None if base == "original" and in_4bit else trained_dtype or dtype,
        )

    @property
    def layers(self) -> int:
        """How many layers the adapter changes."""
        return len(self._deltas.pairs)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.cat(list(self.parts(name)))

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in parts of whole rows, on the CPU."""
        layer = name.removesuffix(".weight")
        if layer not in self._packed and layer not in self._deltas.pairs:
            yield from (self._cast(part) for part in self._weights.parts(name))
            return
        value = self._of_training(self._weights.tensor(name).to(_place()), layer)
        if layer in self._deltas.pairs:
            value = self._deltas.added(value.float(), layer)
        merged = value.to(self.dtype)
        if not torch.isfinite(merged).all():
            raise UserError(
                f"{name}: a merged weight is out of the range of {str(self.dtype).removeprefix('torch.')}; choose --dtype "
                "bfloat16 or float32",
                code="merge.out_of_range",
            )
        yield merged.cpu()

    def _cast(self, part: torch.Tensor) -> torch.Tensor:
        if not part.is_floating_point():
            return part
        return part.to(self._compute or part.dtype).to(self.dtype)

    def _of_training(self, value: torch.Tensor, layer: str) -> torch.Tensor:
        """The value that training computed with."""
        value = value.to(self._compute or value.dtype)
        if layer not in self._packed:
            return value
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            value.contiguous(),
            compress_statistics=self._quantization.bnb_4bit_use_double_quant,
            quant_type=self._quantization.bnb_4bit_quant_type,
        )
        del value
        found: torch.Tensor = dequantize_4bit(packed, state)
        return found


def _entry(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Entry:
    return Entry(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)


@dataclass(frozen=True)
class _Deltas:
    """The adapter's two matrices by the path of their layer, and the factor of their product."""

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @classmethod
    def read(cls, folder: Path, config: RunConfig) -> _Deltas:
        """Raises UserError if the adapter is damaged, or not of this run or its base model."""
        settings = check_folder(folder)
        check_run(folder, settings, config.lora)
        check_base(folder, identity_of_base(config.model))
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise mismatch(folder, f"{WEIGHTS}: {first_line(error)}") from error
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, which = name.removesuffix(".weight").rpartition(".")
            if not name.startswith(_PREFIX) or which not in ("lora_A", "lora_B"):
                raise mismatch(folder, f"{WEIGHTS} has foreign tensors: {name}")
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise mismatch(folder, f"{WEIGHTS}: {name} holds values that are not finite")
            found.setdefault(layer.removeprefix(_PREFIX), {})[which] = tensor
        for layer, pair in found.items():
            if len(pair) < 2:
                raise mismatch(folder, f"{WEIGHTS} lacks tensors: {layer} has {', '.join(pair)} alone")
        pairs = {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in found.items()}
        return cls(pairs, settings["lora_alpha"] / settings["r"])

    def added(self, weight: torch.Tensor, layer: str) -> torch.Tensor:
        """The weight (float32) with the adapter's product added, in the order of operations of PEFT's merge."""
        first, second = (matrix.to(weight.device, torch.float32) for matrix in self.pairs[layer])
        delta = second @ first
        delta *= self.scale
        weight += delta
        return weight


def _place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _skeleton(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _names(skeleton: PreTrainedModel, weights: BaseWeights) -> dict[str, torch.Tensor]:
    """The tensors of the model by name, without those that are tied to another one. Raises UserError if a file lacks one."""
    names = dict(skeleton.state_dict())
    for tied, source in skeleton.all_tied_weights_keys.items():
        if tied not in weights.names or (source in weights.names and _same(weights, tied, source)):
            names.pop(tied, None)
    if missing := sorted(names.keys() - weights.names):
        raise UserError(
            f"model.name: {weights.folder} has no tensor {missing[0]}, which {type(skeleton).__name__} needs; is the folder "
            "complete? (A model whose files name their tensors otherwise than transformers does cannot be merged)",
            code="model.incomplete",
        )
    return names


def _same(weights: BaseWeights, first: str, second: str) -> bool:
    return all(torch.equal(*pair) for pair in zip(weights.parts(first), weights.parts(second), strict=True))


def _check_adapted(skeleton: PreTrainedModel, deltas: _Deltas, folder: Path, config: RunConfig) -> None:
    layers = layers_with_adapter(skeleton, config.lora)
    check_layers(folder, set(layers), set(deltas.pairs))
    for name, (first, second) in deltas.pairs.items():
        rows, columns = layers[name].weight.shape  # type: ignore[misc,union-attr]
        if (second.shape[0], first.shape[1], first.shape[0]) != (rows, columns, second.shape[1]):
            found = f"{list(second.shape)} times {list(first.shape)}"
            raise mismatch(folder, f"{WEIGHTS}: {name} is {found} instead of a product of {[rows, columns]}")


def _quantized_layers(skeleton: PreTrainedModel, section: QuantizationSection) -> set[str]:
    """The layers that training holds in 4 bits: transformers decides it, here as there."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=section.bnb_4bit_quant_type)
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer._process_model_before_weight_loading(skeleton, device_map={"": "cpu"})
    return {name for name, module in skeleton.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def _refuse_quantized(config: RunConfig, model: PretrainedConfig) -> None:
    if getattr(model, "quantization_config", None):
        raise UserError(
            f"model.name: the weights of {config.model.name} are stored in a quantised form, into which no adapter can be "
            "merged; export the adapter (--to adapter), or train on the model's 16-bit weights",
            code="merge.quantized_base",
        )
