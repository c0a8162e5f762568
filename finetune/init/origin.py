"""Where the pairs of a project are in the user's own file, so that a fault is named where it can be repaired.

data/pairs.origin.json, beside data/pairs.jsonl: that file, its SHA-256, and the place of each pair in it. Only messages use it:
what is prepared of the pairs must not depend on where they once came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.project_folder import PAIRS, read_project, sha256_of
from finetune.runtime.files import load_json

ORIGIN = "data/pairs.origin.json"


def origin_text(own: Path, places: Sequence[str]) -> str:
    """places: of each pair, in order, as messages name them: the path of the file, and a line or a record."""
    return json.dumps(
        {
            "file": str(own.expanduser().resolve()),
            "sha256": sha256_of(own.expanduser()),
            "places": [place.removeprefix(str(own)) for place in places],
        }
    )


def changed_since(project: Path) -> Path | None:
    """The user's file, where it has changed since the pairs of a project were made of it; else None."""
    try:
        found, origin = read_project(project), load_json(project / ORIGIN)
        own = Path(origin["file"])
        if found is None or PAIRS not in found.files or found.is_changed(PAIRS) or not own.is_file():
            return None
        return None if sha256_of(own) == origin["sha256"] else _as_seen_here(own)
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None


def own_places(project: Path) -> list[str]:
    """The place of each line of PAIRS; empty where there is none to name: no project of ours, pairs that were not made of a file,
    or either of the two was changed since."""
    try:
        found = read_project(project)
        if found is None or PAIRS not in found.files or found.is_changed(PAIRS):
            return []
        origin = load_json(project / ORIGIN)
        own = Path(origin["file"])
        if sha256_of(own) != origin["sha256"]:
            return []
        return [f"{_as_seen_here(own)}{place}" for place in origin["places"]]
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return []


def _as_seen_here(own: Path) -> Path:
    here = Path.cwd()
    return own.relative_to(here) if own.is_relative_to(here) else own


def in_own_file(text: str, places: Sequence[str]) -> str:
    """A message about lines of PAIRS, with their places in the user's file. A file of that name in another folder is another."""

    def own(found: re.Match[str]) -> str:
        number = int(found[1])
        return places[number - 1] if 0 < number <= len(places) else found[0]

    return re.sub(rf"(?<![\w./-]){re.escape(PAIRS)}:(\d{{1,9}})\b", own, text)
