"""Makes the typed sections of a config from parsed values, and says of each value that does not fit what was expected."""

from __future__ import annotations

import difflib
import json
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, get_type_hints

from omegaconf import MISSING

from finetune.config.convert import Unfit, convert
from finetune.config.references import Place, References
from finetune.config.schema import RunConfig, SourceSection
from finetune.config.yaml_text import Plain, is_null, like_yaml
from finetune.errors import LONGEST_VALUE, MOST_LISTED, UserError, shortened, shown


class Reader:
    """Makes sections of the schema from parsed values; what does not fit becomes one of `problems`."""

    def __init__(self, references: References | None, problems: list[UserError]) -> None:
        self._references, self._problems = references, problems

    def section(self, values: dict[Any, Any], schema: type, place: Place) -> Any:
        """An instance of the dataclass `schema`; it is complete only if no problem was found."""
        made, hints = schema(), get_type_hints(schema)
        for key in [key for key in values if key not in hints]:
            name = _dotted((*place, shown(str(key))[1:-1]))
            near = _nearest(str(key), place, list(hints)) if len(self._problems) < MOST_LISTED else ""
            self._problems.append(UserError(f"unknown key {name}{near}", code="config.unknown_key"))
        for field in fields(schema):
            here = (*place, field.name)
            if field.name in values:
                setattr(made, field.name, self._value(values[field.name], schema, field.name, hints[field.name], here))
            elif field.default == MISSING:
                self._problems.append(UserError(f"missing key {_dotted(here)}", code="config.missing_key"))
            elif is_dataclass(hints[field.name]):
                setattr(made, field.name, self.section({}, hints[field.name], here))  # type: ignore[arg-type]
        return made

    def _value(self, value: Any, schema: type, key: str, hint: Any, place: Place) -> Any:
        if is_dataclass(hint):
            if not isinstance(value, dict) and not is_null(value):  # null: all keys of the section are commented out
                return self._expected("a section of keys", value, place)
            return self.section({} if is_null(value) else value, hint, place)  # type: ignore[arg-type]
        if hint == list[SourceSection]:
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                return self._expected("a list of sources, each with kind and path", value, place)
            return [self.section(item, SourceSection, (*place, str(number))) for number, item in enumerate(value)]
        try:
            filled_in = value if self._references is None else self._references.filled_in(value, place)
            return convert(hint, filled_in)
        except Unfit:
            return self._expected(_describe(schema, key), filled_in, place)
        except UserError as error:
            self._problems.append(UserError(f"{_dotted(place)}: {error}", code=error.code))
            return None

    def _expected(self, what: str, value: Any, place: Place) -> None:
        self._problems.append(
            UserError(f"{_dotted(place)}: expected {what}, found {_found(value)}", code="config.bad_type")
        )


def _dotted(place: Place) -> str:
    """The place as people write it: data.sources[0].path."""
    return "".join(f"[{key}]" if key.isdecimal() else f".{key}" for key in place).removeprefix(".")


def _found(value: Any, depth: int = 3) -> str:
    """A value as an error shows it; what YAML takes for a number, a truth value or null has no quotes there."""
    if is_null(value):
        return "null"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Plain):
        return shown(value)[1:-1] if like_yaml(value) else shown(value)
    if isinstance(value, list | dict):
        if depth == 0:
            return "…"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        few = [(shown(key), _found(item, depth - 1)) for key, item in islice(items, 6)]
        parts = [f"{key}: {item}" if isinstance(value, dict) else item for key, item in few]
        inside = ", ".join([*parts, *["…"][: len(value) - len(parts)]])
        return shortened(f"{{{inside}}}" if isinstance(value, dict) else f"[{inside}]", LONGEST_VALUE)
    return shown(value)


def _describe(schema: type, key: str) -> str:
    hint = str(schema.__annotations__[key]).replace("PathText", "str")
    if hint == "Dtype":
        return "one of auto, bfloat16, float16, float32"
    if hint.startswith("Literal["):
        return "one of " + hint.removeprefix("Literal[").rstrip("]").replace('"', "").replace("'", "")
    return hint


def _nearest(key: str, place: Place, names: list[str]) -> str:
    """A hint with the nearest valid name: in this section first, then anywhere in the schema."""
    close = difflib.get_close_matches(key[:100], names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {_dotted((*place, close[0]))}?)"
    everywhere = {
        name: f"{section.name}.{name}"
        for section in fields(RunConfig)
        for name in (f.name for f in fields(get_type_hints(RunConfig)[section.name]))
    }
    close = difflib.get_close_matches(key[:100], list(everywhere), n=1, cutoff=0.75)
    return f" (did you mean {everywhere[close[0]]}?)" if close else f" (valid here: {', '.join(names)})"
