"""From a text to the logits of the tokens that have a loss, without computing those of all others where that can be avoided."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from finetune.models.architectures import FAMILIES

_PLAIN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_PROBE = (1, 8)
"""Shape of the ids with which a head is compared with its model."""


def logits_at(causal: Any, wanted: Tensor, **inputs: Tensor) -> Tensor:
    """Logits in float32 of the wanted positions: (wanted, vocabulary). wanted: (batch, tokens), true or false. inputs: input_ids
    and attention_mask, each (batch, tokens).

    Many models scale or cap the output of their head (Gemma 2, Granite, Cohere, Falcon-H1): theirs come from the model's own
    forward pass, from the first wanted position on.
    """
    if has_plain_head(causal):
        hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = causal.get_output_embeddings()(hidden[wanted])
        return logits.float()
    positions = wanted.any(dim=0).nonzero()
    first = int(positions[0]) if len(positions) else wanted.shape[1] - 1
    parameters = inspect.signature(causal.forward).parameters
    keep = {"logits_to_keep": wanted.shape[1] - first} if "logits_to_keep" in parameters else {}
    logits = causal(**inputs, use_cache=False, **keep).logits
    return logits[wanted[:, -logits.shape[1] :]].float()


def has_plain_head(causal: Any) -> bool:
    """Whether the logits are the decoder's last hidden states times the output embeddings. Tried once for a model whose class is
    not in FAMILIES; draws no random number."""
    if type(causal).__name__ in {family.causal_lm for family in FAMILIES.values()}:
        return True
    if causal not in _PLAIN:
        _PLAIN[causal] = _tried(causal)
    return _PLAIN[causal]


def _tried(causal: Any) -> bool:
    training = [module for module in causal.modules() if module.training]
    causal.eval()
    try:
        ids = torch.arange(_PROBE[0] * _PROBE[1], device=causal.device).reshape(_PROBE)
        with torch.no_grad():
            whole = causal(input_ids=ids, use_cache=False).logits
            hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(whole, causal.get_output_embeddings()(hidden))
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):  # a model of another form
        return False
    finally:
        for module in training:
            module.training = True
