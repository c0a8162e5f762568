"""YAML whose scalars stay as they are written: `12e4567`, `0012345` and `no` are texts until a key's type says otherwise."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from finetune.errors import first_line, shown
from finetune.runtime.yaml_file import too_deep

LARGEST_BYTES = 1 << 20
"""Of a config file."""
NULLS = ("", "~", "null", "Null", "NULL")
INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")}


class Plain(str):
    """A scalar that was written without quotes, which may mean a number, a truth value or null."""


class BadYaml(ValueError):
    """One line: what is wrong, with line and column where the parser has them."""


def parse(content: bytes | str) -> Any:
    """The document as dicts, lists, and `Plain` or str scalars; None for an empty one.

    Anchors, aliases and merge keys (`<<`) work. Raises BadYaml for what is not YAML, a repeated key, a key that is not a scalar,
    a tag of a kind that a config does not have, and for a document that contains itself or is nested too deeply.
    """
    if too_deep(content.decode("latin-1") if isinstance(content, bytes) else content):
        raise BadYaml("nested too deeply")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
        return None if root is None else _Values().of(root)
    except BadYaml:
        raise
    except RecursionError:
        raise BadYaml("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadYaml(f"{error.problem or error.context}{place}") from error
    except Exception as error:  # the reader and the scanner raise several types
        raise BadYaml(" ".join(str(error).split()) or first_line(error)) from error


def is_null(value: object) -> bool:
    return value is None or (isinstance(value, Plain) and value in NULLS)


def dump(value: Any) -> str:
    """Dicts, lists and scalars as YAML. Whatever some YAML reader could take for something else than a text is in quotes."""
    return str(
        yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False, width=math.inf)
    )


def like_yaml(text: str) -> bool:
    """Whether YAML, 1.1 or 1.2, takes this plain scalar for something else than a text, such as a number or a date."""
    low = text.lower()
    special = text in NULLS or INT.fullmatch(text) or FLOAT.fullmatch(text) or low in SPECIAL or low in TRUTH
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return bool(special) or tag != f"{_TAG}str"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() and text == text.strip() else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style="'" if style is None and like_yaml(text) else style)


_Dumper.add_representer(str, _quoted)
_RESOLVER = yaml.resolver.Resolver()


class _Values:
    """Converts nodes once each, so that aliases of aliases take no more time or memory than their text."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._open: set[int] = set()

    def of(self, node: yaml.Node) -> Any:
        if id(node) in self._open:
            raise BadYaml(f"contains itself{_place(node)}")
        if id(node) not in self._made:
            self._open.add(id(node))
            self._made[id(node)] = self._convert(node)
            self._open.discard(id(node))
        return self._made[id(node)]

    def _convert(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            quoted = node.style is not None or (node.tag == f"{_TAG}str" and node.value in NULLS)
            return node.value if quoted else Plain(node.value)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.of(item) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node)
        raise BadYaml(f"a config has no values of the kind {shown(node.tag)}{_place(node)}")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                self._merge(self.of(value), merged, key)
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise BadYaml(f"a key is a text, not a list or a section{_place(key)}")
            if key.value in own:
                raise BadYaml(f"duplicate key {shown(key.value)[1:-1]}{_place(key)}")
            own[key.value] = self.of(value)
        return merged | own

    def _merge(self, value: Any, merged: dict[str, Any], key: yaml.Node) -> None:
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                raise BadYaml(f"<<: expected a section of keys{_place(key)}")
            for name, item in source.items():
                merged.setdefault(name, item)  # of several sources, the first wins


def _place(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
