"""The templates of all pages, and what lets a page carry data and scripts without a network and without trust.

A page's policy (Content-Security-Policy) names the one script that may run by its hash, so text from a model, a database or a
file name cannot run as a script, even if it were not escaped. Data is embedded as JSON in which no character can end its element.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.report.bars import counts
from finetune.runtime.console import visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

PACKAGE = "finetune.report"


@dataclass(frozen=True)
class Script:
    """text: to inline. policy: the source expression that allows it, and nothing else."""

    text: Markup
    policy: str


def pages() -> Environment:
    """The templates. Text of questions, SQL and error messages is escaped for HTML or Markdown."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE),
        autoescape=lambda name: ".html" in str(name),
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # a Markup is our own
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=markdown_inline, counts=counts)
    return environment


def script(environment: Environment, *names: str) -> Script:
    """The JavaScript files of templates/ as one script. They are read as they are: they are no templates."""
    from markupsafe import Markup

    assert environment.loader is not None
    text = "\n".join(environment.loader.get_source(environment, name)[0] for name in names)
    text = f'"use strict";\n(() => {{\n{text}\n}})();\n'
    assert "</script" not in text.lower() and "<!--" not in text
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), f"'sha256-{digest}'")


def embedded(value: Any) -> Markup:
    """The value as JSON for <script type="application/json">. Control characters in texts become escapes that are shown."""
    from markupsafe import Markup

    text = json.dumps(_visible(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list | tuple) else value


def markdown_inline(value: object) -> str:
    """The text on one line, escaped so that Markdown shows it literally."""
    text = html.escape(" ".join(visible(str(value)).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
