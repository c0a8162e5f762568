"""Hooks of mkdocs (mkdocs.yml): pages that are made from the code, and links to files outside docs/.

reference/config.md and reference/cli.md come from dev/docs_reference.py, tutorials/notebook.md from
docs/notebooks/first_run.ipynb, so none of them can fall behind. `make docs` runs mkdocs from the root, where `dev` is found.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dev.docs_reference import cli_reference, config_reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "first_run.ipynb"
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s]+)\)")
log = logging.getLogger("mkdocs.hooks.finetune")  # mkdocs counts warnings of its own loggers: --strict fails on them


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    made = {
        "reference/config.md": config_reference(),
        "reference/cli.md": cli_reference(),
        "tutorials/notebook.md": notebook_page(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    text, missing = without_links_to_the_repository(markdown, Path(page.file.src_uri).parent)
    for target in missing:
        log.warning(f"{page.file.src_uri}: the link {target} leads to no file of the repository")
    return text


def without_links_to_the_repository(markdown: str, folder: Path) -> tuple[str, list[str]]:
    """A site has no pages for files outside docs/: a link to one becomes its path, and those that do not exist are listed.

    folder: that of the page, relative to docs/.
    """
    missing = []

    def shown(match: re.Match[str]) -> str:
        label, target = match.groups()
        path = Path(os.path.normpath(DOCS / folder / target.partition("#")[0]))
        if path == NOTEBOOK:
            return f"[{label}]({os.path.relpath(DOCS / 'tutorials' / 'notebook.md', DOCS / folder)})"
        if "://" in target or target.startswith(("#", "mailto:")) or path.is_relative_to(DOCS):
            return match.group()
        if not (path.is_relative_to(ROOT) and path.exists()):
            missing.append(target)
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        return f"`{name}`" if label.strip("`") in (name, path.name) else f"{label} (`{name}`)"

    return LINK.sub(shown, markdown), missing


def notebook_page() -> str:
    """The cells of the notebook, without outputs: those are of the reader's own machine."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).rstrip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
