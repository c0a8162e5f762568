"""What may be the name of a run, which is the name of its folder."""

from __future__ import annotations

import unicodedata

LONGEST_NAME = 100
"""Characters. W&B allows 128."""
LONGEST_NAME_BYTES = 200
"""In UTF-8. File systems allow 255, and temporary names are longer than the name."""
SWEEPS = "sweeps"
RESERVED = {
    "base": "the base models' scores",
    "predictions": "the scores of somebody else's answers",
    SWEEPS: "the sweeps",
}
"""Folders beside the runs -> what is in them."""


def fault_of_name(name: str) -> str | None:
    """What is wrong with the name of a run, as the end of a message; None for a valid one."""
    expected = f"expected a plain folder name of at most {LONGEST_NAME} characters"
    shown = repr(name if len(name) <= LONGEST_NAME else f"{name[:40]}...")
    if len(name) > LONGEST_NAME or len(name.encode(errors="replace")) > LONGEST_NAME_BYTES:
        return f"{expected}, found {len(name)}: {shown}"
    if not name or name != name.strip() or name[0] in ".-" or "/" in name or "\\" in name or not _visible(name):
        return f"{expected}, without separators or control characters, and no dot, dash or space first, found {shown}"
    if content := RESERVED.get(name.casefold()):
        return f"expected another name: {shown} is the folder of {content}"
    return None


def _visible(name: str) -> bool:
    """No control or format characters, no lone surrogates, no line or paragraph separators."""
    return not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name)
