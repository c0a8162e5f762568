"""Typed JSON objects: one plain dataclass per object, with fields named like the keys.

vars() of an instance equals the object in the file: keys without a field are kept, and a key that is absent in the file is absent
here. A field that was never set reads as its default, which therefore has to be immutable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from finetune.errors import shown

Kind = TypeVar("Kind")

LARGEST = 1 << 63
"""No whole number in a file of ours reaches it: these are counts, sizes in bytes, steps and seeds."""
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Mismatch(ValueError):
    """A value does not match its type. The message begins with the dotted key."""


def decode(kind: type[Kind], value: Mapping[str, object]) -> Kind:
    """Convert a JSON object to an instance of the dataclass `kind`. Raises Mismatch."""
    return _object(kind, value, "")


def update(record: object, values: Mapping[str, object]) -> None:
    """Set fields of a dataclass from a JSON object. Raises Mismatch."""
    vars(record).update(vars(_object(type(record), values, "", partly=True)))


def encode(value: object) -> Any:
    """Convert to what `json.dump` takes: the inverse of `decode`."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def _object(kind: type[Kind], values: Mapping[str, object], where: str, partly: bool = False) -> Kind:
    made, fields = kind.__new__(kind), get_type_hints(kind)
    for key, value in values.items():
        vars(made)[key] = _checked(fields[key], value, where + key) if key in fields else value
    for key in fields:
        if not partly and not hasattr(made, key):
            raise Mismatch(f"{where}{key}: missing")
    return made


def _checked(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, UnionType):  # X | None
        if value is None:
            return None
        (kind,) = set(get_args(kind)) - {NoneType}
    if not _has_shape(kind, value):
        found = f", found {shown(value)}" if kind in NAMES else ""
        raise Mismatch(f"{where}: expected {_described(kind)}{found}")
    if is_dataclass(kind):
        return _object(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(kind) is Mapping:
        return {key: _checked(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if get_origin(kind) is Sequence:
        return [_checked(get_args(kind)[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    return value


def _has_shape(kind: Any, value: object) -> bool:
    """Whether the value has the JSON type of `kind`; the fields of an object are not checked."""
    if get_origin(kind) is Sequence:
        return isinstance(value, list | tuple) and all(_has_shape(get_args(kind)[0], item) for item in value)
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        return isinstance(value, dict)
    if kind in (int, float):
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return fits and (isinstance(value, float) or abs(value) < LARGEST)  # type: ignore[arg-type]
    return kind is Any or isinstance(value, kind)


def _described(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return f"a list of {_described(get_args(kind)[0]).split(' ', 1)[1]}s"
    return NAMES.get(kind, "an object")
