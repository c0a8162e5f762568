"""A tokenizer as a GGUF file describes it, and the proof that llama.cpp makes the same token ids of a text.

Two kinds are known: byte-level BPE ("gpt2": Llama 3, Qwen2, SmolLM2), whose rule for splitting a text into words llama.cpp knows
by name, and BPE over characters with a fallback to bytes ("llama": Llama 2, Mistral), which llama.cpp merges by score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gguf import GGUFWriter, TokenType

from finetune.errors import UserError, shown
from finetune.models.llama_cpp import LlamaServer
from finetune.tokens import PROBE, _added, _is_control, encode_prompts, stop_ids

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS: dict[tuple[Any, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA_3, "bytes"): "llama-bpe",
    (_QWEN_2, "bytes"): "qwen2",
}
"""Rule for splitting a text, as in tokenizer.json -> its name in llama.cpp (conversion/base.py, src/llama-vocab.cpp)."""
_SCORE_OF_NONE = -1e6
"""Of a piece that no merge makes."""


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, model: Any, vocabulary: int) -> None:
    """Describe the tokenizer in a GGUF file. model: its config, for the tokens that end an answer. vocabulary: rows of the
    embeddings. Raises UserError for a tokenizer of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    values = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "Python"}}
    if values["model"]["type"] != "BPE":
        raise _unknown(tokenizer, f"it is of the kind {values['model']['type']}")
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocabulary))))
    splitting = _splitting(values.get("pre_tokenizer"))
    by_bytes = splitting is not None and splitting[-1] in ("ByteLevel", "bytes")
    kinds = [_kind(tokenizer, number, str(piece), by_bytes) for number, piece in enumerate(pieces)]
    texts = [str(piece) for piece in pieces]
    texts += [f"[PAD{number}]" for number in range(len(pieces), vocabulary)]
    kinds += [TokenType.UNUSED] * (vocabulary - len(pieces))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    if by_bytes:
        if splitting not in _WORDS:
            raise _unknown(tokenizer, f"llama.cpp has no name for its rule {shown(splitting)}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_WORDS[splitting])
        writer.add_token_list(texts)
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(texts)
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    writer.add_token_types([kind.value for kind in kinds])
    _add_special(writer, tokenizer, model)


def differing(server: LlamaServer, tokenizer: Any, prompts: Sequence[str]) -> str:
    """The beginning of the first of the prompts that llama.cpp reads as other token ids than training did; "" if none is."""
    for prompt, ids in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        if server.tokenize(prompt) != ids:
            return prompt
    return ""


def _add_special(writer: GGUFWriter, tokenizer: Any, model: Any) -> None:
    before, _ = _added(tokenizer)
    ends = stop_ids(tokenizer, model)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if before:
        if len(before) > 1:
            raise _unknown(tokenizer, f"it writes {len(before)} tokens before a text")
        writer.add_bos_token_id(before[0])
    elif tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(False)  # the answer follows the prompt


def _splitting(rule: dict[str, Any] | None) -> tuple[Any, ...] | None:
    """The rule for splitting a text in the form of `_WORDS`; None for a tokenizer that does not work on bytes."""
    if rule is None:
        return None
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None if not any(step["type"] == "ByteLevel" for step in steps) else ("other", "ByteLevel")
    if steps[-1].get("use_regex", True):
        return tuple(_step(step) for step in steps)
    return (*(_step(step) for step in steps[:-1]), "bytes")


def _step(step: dict[str, Any]) -> Any:
    if step["type"] == "Split":
        return step["pattern"].get("Regex")
    if step["type"] == "Digits" and not step.get("individual_digits"):
        return "groups of digits"
    return step["type"]


def _kind(tokenizer: Any, number: int, piece: str, by_bytes: bool) -> TokenType:
    entry = getattr(tokenizer, "added_tokens_decoder", {}).get(number)
    special = piece in tokenizer.all_special_tokens
    if entry is not None or special:
        if number == tokenizer.unk_token_id and not by_bytes:
            return TokenType.UNKNOWN
        control = _is_control(piece, special or getattr(entry, "special", False))
        return TokenType.CONTROL if control else TokenType.USER_DEFINED
    if not by_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(texts: Sequence[str], merges: Sequence[str]) -> list[float]:
    """The higher a score, the earlier llama.cpp merges two pieces into this one: in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[text]) if text in ranks else _SCORE_OF_NONE for text in texts]


def _adds_space(tokenizer: Any) -> bool:
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return bool(str(tokenizer.convert_ids_to_tokens(ids)[0]).startswith("▁"))


def _unknown(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the tokenizer {type(tokenizer).__name__} cannot be written as GGUF: {why}; export with --to merged",
        code="export.no_gguf",
    )
