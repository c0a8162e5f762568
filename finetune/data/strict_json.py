"""JSON in which no key may occur twice: Python's reader keeps the last value of a repeated key without a word."""

import json
from collections.abc import Iterator
from typing import Any

from finetune.runtime.files import RepeatedKeyError, without_repeated_keys


def loads(text: str) -> Any:
    """As json.loads. Raises RepeatedKeyError as well, for an object at any depth."""
    return json.loads(text, object_pairs_hook=without_repeated_keys)


def array_items(text: str) -> Iterator[tuple[Any, str | None]]:
    """The entries of a JSON array, each with the repeated key in it as a problem, or None.

    Raises json.JSONDecodeError, ValueError and RecursionError as json.loads does, and TypeError for any other value.
    """
    value = json.loads(text)
    if not isinstance(value, list):
        raise TypeError("not an array")
    try:
        yield from ((item, None) for item in loads(text))
    except RepeatedKeyError:
        yield from _one_by_one(text, value)


def _one_by_one(text: str, items: list[Any]) -> Iterator[tuple[Any, str | None]]:
    lenient = json.JSONDecoder()
    position = text.index("[") + 1
    for item in items:
        while text[position] in " \t\r\n,":
            position += 1
        _, end = lenient.raw_decode(text, position)
        try:
            loads(text[position:end])
            yield item, None
        except RepeatedKeyError as error:
            yield item, str(error)
        position = end
