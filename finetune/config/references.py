"""`${section.key}` in a config, and in paths `~`, `$HOME` and `${HOME}`; no other reference, so that no secret gets in."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from finetune.config.schema import PATH, RunConfig, SourceSection
from finetune.config.yaml_text import Plain, is_null
from finetune.errors import UserError, shown
from finetune.runtime import paths

LONGEST_TEXT = 10_000
"""Characters of one value with its references filled in."""
MOST_VALUES = 100_000
"""In lists and sections of a whole config; aliases of aliases in YAML can make any number from a few lines."""
Place = tuple[str, ...]
"""Keys and list positions from the top of the config down, such as ("data", "sources", "0", "path")."""

_REFERENCE = re.compile(r"(\\*)\$\{(?:([^{}]*)\})?")
_KEY = re.compile(r"\.*[a-z_][a-z0-9_]*(?:\.[A-Za-z0-9_]+|\[[0-9]+\])+|\.+[a-z_][a-z0-9_]*")


class References:
    """Fills in what the values of one config refer to."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._found: dict[Place, Any] = {}
        self._open: list[Place] = []
        self._seen = 0

    def filled_in(self, value: Any, place: Place) -> Any:
        """The value of a key with all its references filled in. Raises UserError, without the key."""
        self._seen += 1
        if self._seen > MOST_VALUES:
            raise UserError("is far too large", code="config.too_large")
        if isinstance(value, list):
            return [self.filled_in(item, (*place, str(number))) for number, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self.filled_in(item, (*place, key)) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        optional = PATH_KEYS.get(_key_of(place))
        if is_null(value) and (optional is not False or value != "~"):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole and not whole[1] and whole[2] is not None and _KEY.fullmatch(whole[2]):
            return self._value_of(whole[2], place)
        text = self._path(value, place) if optional is not None else self._text(value, place)
        if len(text) > LONGEST_TEXT:
            raise UserError("its references make a text that is far too long", code="config.bad_reference")
        return Plain(text) if isinstance(value, Plain) and optional is None else text

    def _path(self, text: str, place: Place) -> str:
        if (begin := re.search(r"(?<!\\)\$\{[^}]*(?:\{|$)", text)) is not None:
            raise _unclosed(begin[0])
        return paths.expanded(text, lambda name: self._within(name, place) if _KEY.fullmatch(name) else None)

    def _text(self, text: str, place: Place) -> str:
        def fill(match: re.Match[str]) -> str:
            kept = match[1][: len(match[1]) // 2]
            if len(match[1]) % 2:
                return kept + match[0][len(match[1]) :]
            if match[2] is None:
                raise _unclosed(text[match.start() :])
            return kept + self._within(match[2], place)

        return _REFERENCE.sub(fill, text) if "${" in text else text

    def _within(self, name: str, place: Place) -> str:
        """A referenced value as part of a text."""
        value = self._value_of(name, place)
        if isinstance(value, bool):
            return str(value).lower()
        if is_null(value) or isinstance(value, list | dict):
            raise UserError(f"{_as_written(name)}: is not a text or a number", code="config.bad_reference")
        return str(value)

    def _value_of(self, name: str, place: Place) -> Any:
        if not _KEY.fullmatch(name):
            raise UserError(
                f"{_as_written(name)}: expected the name of another key, as in ${{data.output_dir}}; environment variables are "
                "read in paths only",
                code="config.bad_reference",
            )
        target = _absolute(name, place)
        if target in self._found:
            return self._found[target]
        if target in self._open or target == place:
            raise UserError(f"{_as_written(name)}: refers to itself", code="config.bad_reference")
        self._open.append(target)
        try:
            value = self.filled_in(self._raw(target, name), target)
        finally:
            self._open.pop()
        self._found[target] = value
        return value

    def _raw(self, target: Place, name: str) -> Any:
        value: Any = self._tree
        default: Any = RunConfig()
        for key in target:
            if isinstance(value, dict) and key in value:
                value, default = value[key], getattr(default, key, None)
            elif isinstance(value, list) and key.isdecimal() and len(key) < 9 and int(key) < len(value):
                value, default = value[int(key)], SourceSection()  # the only list of sections
            elif (value is None or isinstance(value, dict) or is_null(value)) and hasattr(default, key):
                value = default = getattr(default, key)
                value = {} if is_dataclass(value) else value
            else:
                raise UserError(f"{_as_written(name)}: there is no such key", code="config.bad_reference")
        if value == MISSING:
            raise UserError(f"{_as_written(name)}: this key has no value", code="config.bad_reference")
        return value


def escaped(value: Any, place: Place = ()) -> Any:
    """The value as a config file has it, so that reading it gives this value again: texts that look like references have a
    backslash before them."""
    if isinstance(value, list):
        return [escaped(item, (*place, str(number))) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: escaped(item, (*place, key)) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if _key_of(place) in PATH_KEYS:
        return paths.escaped(value)
    return re.sub(r"(\\*)(\$\{)", lambda match: rf"{match[1] * 2}\{match[2]}", value)


def _absolute(name: str, place: Place) -> Place:
    keys = name.lstrip(".").replace("[", ".").replace("]", "")
    up = len(name) - len(name.lstrip("."))
    return (*(place[:-up] if up else ()), *keys.split("."))


def _as_written(name: str) -> str:
    return f"${{{shown(name)[1:-1]}}}"


def _unclosed(text: str) -> UserError:
    return UserError(
        rf"{shown(text)}: expected one name between ${{ and }}; write \${{ for these characters themselves",
        code="config.bad_reference",
    )


def _key_of(place: Place) -> Place:
    return tuple(key for key in place if not key.isdecimal())


def _path_keys(schema: type, place: Place = ()) -> dict[Place, bool]:
    """The keys of the schema that hold paths, without list positions -> whether they may be null."""
    found: dict[Place, bool] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        parts = get_args(hint)
        if is_dataclass(hint):
            found |= _path_keys(hint, (*place, name))  # type: ignore[arg-type]
        elif get_origin(hint) is list and is_dataclass(parts[0]):
            found |= _path_keys(parts[0], (*place, name))  # type: ignore[arg-type]
        elif any(get_origin(part) is Annotated and PATH in part.__metadata__ for part in (hint, *parts)):
            found[(*place, name)] = NoneType in parts
    return found


PATH_KEYS = _path_keys(RunConfig)
