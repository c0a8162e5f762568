"""Forward passes of a transformers model over rows that begin and end at different times, and which models allow them.

transformers gets its own cache class with another layout, explicit positions and a mask of four dimensions. Every layer must
attend to all tokens before the current one: a sliding window does so for texts that fit into it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from finetune.evaluation.generators.asked import is_out_of_memory
from finetune.evaluation.generators.row_cache import Kept, RowCache
from finetune.evaluation.generators.rows_attention import NAME, using
from finetune.models.architectures import FAMILIES
from finetune.models.attention import soft_cap
from finetune.runtime.console import say

_AGREES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference of logits, relative to the largest logit, that is rounding and not another computation."""
_TRIED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Text:
    """The ids that follow `start` tokens, whose keys and values are kept already if there are any."""

    ids: Sequence[int]
    start: int = 0
    kept: Kept | None = None


class Passes:
    """A causal model, without the wrapper of PEFT around it. column_bytes: that the cache of one token needs, about."""

    def __init__(self, model: Any) -> None:
        self.causal = causal_model(model)
        self.device = self.causal.device
        self.attention = _attention(self.causal)
        config = self.causal.config.get_text_config(decoder=True)
        self._layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.column_bytes = 2 * self._layers * heads * width * self.causal.dtype.itemsize
        self._last_only = "logits_to_keep" in inspect.signature(type(self.causal).forward).parameters

    def cache(self, rows: int, columns: int) -> RowCache:
        return RowCache(self._layers, rows, columns)

    def on_device(self, values: Sequence[Any]) -> Tensor:
        found = torch.tensor(values, dtype=torch.long)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    def forward(self, cache: RowCache, ids: Tensor, positions: Tensor, places: Tensor, columns: int) -> Tensor:
        """The logits after the last token of each row: (rows, vocabulary).

        ids, positions, places: (rows, tokens); places: the columns of the cache that the tokens go to. columns: of which
        attention sees those up to a token's position.
        """
        cache.show(places, columns)
        mask = (torch.arange(columns, device=self.device) <= positions[:, :, None])[:, None]
        if self.attention == "eager":
            kind = self.causal.dtype
            mask = torch.zeros(mask.shape, dtype=kind, device=self.device).masked_fill(~mask, torch.finfo(kind).min)
        output = self.causal(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self._last_only else {}),
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def begin(self, texts: Sequence[Text]) -> tuple[RowCache, Tensor]:
        """A cache of these texts, and the logits after each. Shorter ones are padded on the left."""
        width = max(len(text.ids) for text in texts)
        columns = max(text.start + len(text.ids) for text in texts)
        cache = self.cache(len(texts), columns)
        first = 0
        for row, text in enumerate(texts):  # neighbours with the same beginning get it together
            if row + 1 == len(texts) or texts[row + 1].kept is not text.kept:
                if text.kept is not None:
                    cache.put(first, row + 1, text.kept)
                first = row + 1
        ids, positions, places = [], [], []
        for text in texts:
            padding, here = width - len(text.ids), range(text.start, text.start + len(text.ids))
            ids.append([0] * padding + list(text.ids))
            positions.append([0] * padding + list(here))
            places.append([columns] * padding + list(here))
        logits = self.forward(cache, *map(self.on_device, (ids, positions, places)), columns)
        return cache, logits


def causal_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def longest_text(model: Any) -> float:
    """Prompt and answer in tokens that decoding.py may serve with this model; 0 if it cannot at all."""
    causal = causal_model(model)
    config = getattr(causal, "config", None)
    if not isinstance(causal, torch.nn.Module) or config is None:
        return 0
    longest = longest_configured(config)
    if not longest or _attention(causal) is None:
        return 0
    if type(causal).__name__ in {family.causal_lm for family in FAMILIES.values()}:
        return longest  # tests compare these classes with `generate`
    if causal not in _TRIED:
        _TRIED[causal] = _tried(causal)
        if not _TRIED[causal]:
            say(
                f"{type(causal).__name__} computes something else with rows of its own length: decoding in static batches"
            )
    return longest if _TRIED[causal] else 0


def longest_configured(config: Any) -> float:
    """The same by the model's config alone. Every layer must keep all its keys and values: some models have layers of another
    kind, or keep what lies in a window."""
    if getattr(config, "is_encoder_decoder", False):
        return 0
    text = config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0
    if len(layers) != text.num_hidden_layers:
        return 0
    longest = float("inf")
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer:
            longest = min(longest, layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            return 0
    return longest


def _attention(causal: Any) -> str | None:
    """The attention to use; None if the model has one that needs masks of its own."""
    if getattr(type(causal), "_supports_sdpa", False) and not soft_cap(causal.config):
        return NAME
    return "eager" if getattr(causal.config, "_attn_implementation", None) == "eager" else None


@torch.inference_mode()
def _tried(causal: Any) -> bool:
    """Whether two texts of different length with a common beginning, and one token more, give the logits of a plain pass."""
    training = [module for module in causal.modules() if module.training]
    causal.eval()
    first, second = list(range(3, 14)), [*range(3, 8), 11]
    try:
        passes = Passes(causal)
        expected = [
            causal(input_ids=passes.on_device([[*ids, 9]]), use_cache=False).logits[:, -1] for ids in (first, second)
        ]
        with using(causal, str(passes.attention)):
            kept = passes.begin([Text(first[:4])])[0].text(0, 4)
            begun, _ = passes.begin([Text(ids[4:], 4, kept) for ids in (first, second)])
            cache = passes.cache(2, 16)
            cache.take([0, 1], begun, 11)
            place = passes.on_device([[11], [6]])
            found = passes.forward(cache, passes.on_device([[9], [9]]), place, place, 12)
        difference = (found - torch.cat(expected)).abs().max()
        return bool(difference <= _AGREES.get(causal.dtype, 1e-4) * torch.cat(expected).abs().max())
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return False
    finally:
        for module in training:
            module.training = True
