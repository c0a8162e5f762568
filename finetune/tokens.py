"""From text to token ids and back, for training, token counts, evaluation and `generate` alike.

What users give (schema, question, evidence, gold SQL) is text: a `</s>` or `<|im_end|>` in it never becomes the control token
of that name. What the tokenizer adds before a text (a BOS) stands before every prompt; what it adds after a text (an EOS) is
left out, because the answer follows the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from finetune.errors import UserError
from finetune.example import Example

PROBE = "SELECT 1"
"""A text whose tokens show what the tokenizer adds around a text."""
_MARKUP = re.compile(r"\s*(<.+>|\[.+\]|\{.+\})\s*", re.DOTALL)
"""The form of a control token, as in <|im_end|>, [INST], </s>. Of the tokens that a tokenizer has added to its vocabulary without
declaring them special, only these are control tokens: others are text, such as Gemma's runs of line ends."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts as token ids, after what the tokenizer adds before a text."""
    if not prompts:
        return []
    before, _ = _added(tokenizer)
    return [[*before, *ids] for ids in _control(tokenizer).of(tokenizer, prompts)]


def encode_examples(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
    """Training examples as token ids. Prompt and answer are tokenised separately and concatenated, so that the ids before the
    answer are exactly those that generation starts from, however the tokenizer would merge across the boundary."""
    ends = _control(tokenizer).of(tokenizer, answers) if answers else []
    return [
        Example([*start, *end, tokenizer.eos_token_id], len(start))
        for start, end in zip(encode_prompts(tokenizer, prompts), ends, strict=True)
    ]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated tokens: without control tokens, and with every space."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def stop_ids(tokenizer: Any, model: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end-of-text token first, then those of the model's generation config, such
    as the end of a turn in Llama 3."""
    found = [tokenizer.eos_token_id]
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        found += ends if isinstance(ends, list | tuple) else [ends]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def added_after(tokenizer: Any) -> str:
    """The tokens that the tokenizer would add after each text, which are left out; "" for most tokenizers."""
    _, ids = _added(tokenizer)
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(ids))) if ids else ""


@dataclass(frozen=True)
class _Control:
    """A tokenizer's control tokens, which no text may become. names: by id. unknown: the id for characters without a token, if
    that is one of them. backend: the tokenizer of the library tokenizers; None for one in Python."""

    names: dict[int, str]
    unknown: int | None
    backend: Any

    def of(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts alone. A text that the tokenizer reads as holding a control token is encoded again without those."""
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [
            self._plain(tokenizer, text) if self._in(ids, text) else list(ids)
            for ids, text in zip(found, texts, strict=True)
        ]

    def _in(self, ids: Iterable[int], text: str) -> bool:
        """Whether ids have a control token, other than for a character of the text that has no token."""
        found = self.names.keys() & set(ids)
        if self.unknown in found and self.names[self.unknown].strip() not in text:
            found -= {self.unknown}
        return bool(found)

    def _plain(self, tokenizer: Any, text: str) -> list[int]:
        if self.backend is None:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            ids: list[int] = tokenizer([text], **options)["input_ids"][0]
        else:
            ids = self._without_control.encode(text, add_special_tokens=False).ids
        if left := [self.names[token] for token in ids if token in self.names and token != self.unknown]:
            raise UserError(
                f"model.name: its tokenizer cannot write {left[0]!r} as text, and this text holds it: "
                f"{_around(text, left[0])!r}; remove it from the data or the question, or use another model",
                code="model.control_token",
            )
        return ids

    @cached_property
    def _without_control(self) -> Any:
        """The tokenizer with all control tokens renamed to what no text holds, so that every id keeps its meaning."""
        from tokenizers import Tokenizer

        values = json.loads(self.backend.to_str())
        renamed = {name: f"\U0010fffe{token}\U0010fffe" for token, name in self.names.items()}
        for token in values["added_tokens"]:
            if token["id"] in self.names:
                token |= {"content": renamed[token["content"]], "normalized": False}
        _rename(values["model"], renamed, self.names)
        values |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(values))


def _rename(model: dict[str, Any], renamed: dict[str, str], control: dict[int, str]) -> None:
    """Rename the control tokens in the vocabulary of a tokenizer's model, in place."""
    if isinstance(model["vocab"], list):  # Unigram: [piece, score], the id is the place
        for token, name in control.items():
            if token < len(model["vocab"]):
                model["vocab"][token][0] = renamed[name]
        return
    names = {piece: renamed[control[token]] for piece, token in model["vocab"].items() if token in control}
    model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]


def _makes(merge: str | Sequence[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


_KNOWN: WeakKeyDictionary[Any, tuple[Any, _Control]] = WeakKeyDictionary()


def _control(tokenizer: Any) -> _Control:
    """Made once for each state of a tokenizer, to which a caller may add tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = frozenset(getattr(tokenizer, "all_special_tokens", ()))
    kept = _KNOWN.get(tokenizer)
    if kept is None or kept[0] != (len(added), special):
        names = {
            token: str(entry)
            for token, entry in added.items()
            if _is_control(str(entry), str(entry) in special or getattr(entry, "special", False))
        }
        unknown = getattr(tokenizer, "unk_token_id", None)
        made = _Control(names, unknown if unknown in names else None, getattr(tokenizer, "backend_tokenizer", None))
        kept = _KNOWN[tokenizer] = (len(added), special), made
    return kept[1]


def _is_control(name: str, special: bool) -> bool:
    """Whether an added token is one that no text may become. One character or white space alone is text, also where a tokenizer
    pads with it."""
    if len(name.strip()) < 2 or _BYTE.fullmatch(name):
        return False
    return special or _MARKUP.fullmatch(name) is not None


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a text."""
    around, alone = (list(tokenizer([PROBE], add_special_tokens=wanted)["input_ids"][0]) for wanted in (True, False))
    for start in range(len(around) - len(alone) + 1):
        if around[start : start + len(alone)] == alone:
            before, after = around[:start], around[start + len(alone) :]
            twice = len(before) > 1 and len(set(before)) == 1  # one BOS by a flag and one by the post-processor
            return before[:1] if twice else before, after
    raise UserError(
        "model.name: its tokenizer encodes a text otherwise when it adds its own tokens, so a prompt cannot be told from them; "
        "use another model",
        code="model.odd_tokenizer",
    )


def _around(text: str, part: str, characters: int = 30) -> str:
    place = max(0, text.find(part.strip()))
    return text[max(0, place - characters) : place + len(part) + characters]
