"""From a scalar's text to the type of its key: numbers as in YAML 1.2, texts exactly as written."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from finetune.config.yaml_text import FLOAT, INT, SPECIAL, TRUTH, is_null

LONGEST_NUMBER = 400
"""Characters; no key has a longer one, and Python refuses to read thousands of digits."""


class Unfit(ValueError):
    """The value does not have the type of the key."""


def convert(hint: Any, value: Any) -> Any:
    """A parsed value (`config.yaml_text`) or a JSON value as the type `hint` of the schema. Raises Unfit."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return _any_of(get_args(hint), value)
    if get_origin(hint) is Literal:
        return _one_of(get_args(hint), value)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise Unfit
        return [convert(get_args(hint)[0], item) for item in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise Unfit
        kind = get_args(hint)[1]
        return {_text(key): convert(kind, item) for key, item in value.items()}
    kinds: dict[Any, Callable[[Any], Any]] = {str: _text, bool: _truth, int: _whole, float: _number}
    return kinds[hint](value)


def _any_of(hints: tuple[Any, ...], value: Any) -> Any:
    if is_null(value) and NoneType in hints:
        return None
    kinds = [hint for hint in hints if hint is not NoneType]
    words = [hint for hint in kinds if _is_words(hint)]
    for hint in [*words, *(hint for hint in kinds if hint not in words)]:
        try:
            return convert(hint, value)
        except Unfit:
            continue
    raise Unfit


def _is_words(hint: Any) -> bool:
    """Whether the type is one of a few words, such as Literal["auto"]."""
    origin: Any = get_origin(hint)
    return origin is Literal


def _one_of(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if value == choice and isinstance(value, str) == isinstance(choice, str):
            return choice
    raise Unfit


def _text(value: Any) -> str:
    if not isinstance(value, str) or is_null(value) or value == "???" or "\0" in value:
        raise Unfit
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character
        raise Unfit from None
    return str.__str__(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in TRUTH:
        raise Unfit
    return TRUTH[value.lower()]


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER or not INT.fullmatch(value):
        raise Unfit
    return int(value, 0) if value[:2] in ("0x", "0o") else int(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        if value.lower() in SPECIAL:
            return SPECIAL[value.lower()]
        if len(value) <= LONGEST_NUMBER and FLOAT.fullmatch(value):
            return float(value.replace("_", "")) + 0.0  # -0.0 becomes 0.0, which has the same hash of the config
        value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit
    try:
        return float(value) + 0.0
    except OverflowError:  # 10**400
        raise Unfit from None
