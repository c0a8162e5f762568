"""Paths as people write them: `~`, `~user`, `$HOME` and `${HOME}` are expanded, here and nowhere else.

The shell expands them in most places, but not in a YAML file, in quotes, or after the `=` of `training.output_dir=~/runs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError, shown

VARIABLES = ("HOME", "USER", "LOGNAME", "PWD", "TMPDIR", "HF_HOME", "SCRATCH", "WORK", "PROJECT", "DATA", "STORE")
ENDINGS = ("_DIR", "_HOME", "_PATH", "_ROOT", "_FOLDER", "_CACHE")
"""Names of the environment variables that a path may hold: these, and those with such an ending. No others, because a path is
written into the run's folder and into messages, where HF_TOKEN must not appear."""
SECRET = re.compile(
    r"(?:.*_)?(?:KEY|PASS|AUTH|PAT)S?(?:_.*)?|.*(?:TOKEN(?!I[ZS])|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:API|ACCESS|PRIVATE)KEY).*"
)
LONGEST_NAME = 255
"""Bytes of one file or folder name: NAME_MAX of every usual file system."""
LONGEST_PATH = 4095
"""Bytes: PATH_MAX of Linux, without its end."""

_VARIABLE = re.compile(r"(\\*)(?:\$([A-Za-z_][A-Za-z0-9_]*)|\$\{([^{}]*)\}|(\$\{))")
_HOME = re.compile(r"(\\*)(~[^/]*)")
_ENVIRONMENT = re.compile(r"(?:oc\.env:)?([A-Za-z_][A-Za-z0-9_]*)(?:,(.*))?")


def cache_root() -> Path:
    """The folder of what can be made or fetched again: FINETUNE_CACHE, else finetune/ in the user's cache folder."""
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def expanded(text: str, referenced: Callable[[str], str | None] = lambda name: None) -> str:
    r"""The path with its home folder and variables filled in; a `~` elsewhere and a lone `$` are ordinary characters.

    `\~` and `\$` are written where the characters themselves are meant. referenced: what a config has for a name in braces, None
    for the name of a variable. Raises UserError for an unknown user, for a variable that is not set or not allowed, and for a
    path that no file system takes.
    """
    literal = _fits(text) and _exists(text)

    def fill(match: re.Match[str]) -> str:
        slashes, whole = match[1], match[0][len(match[1]) :]
        kept = slashes[: len(slashes) // 2]
        if len(slashes) % 2:
            return kept + whole
        found = referenced(match[3]) if match[3] is not None else None
        return kept + (_value(match[2] or match[3] or "", whole, literal) if found is None else found)

    return checked(_with_home(_VARIABLE.sub(fill, text) if "$" in text else text))


def escaped(path: str) -> str:
    """The text that `expanded` turns into this path."""
    path = _VARIABLE.sub(lambda match: rf"{match[1] * 2}\{match[0][len(match[1]) :]}", path)
    return _HOME.sub(lambda match: rf"{match[1] * 2}\{match[2]}", path, count=1) if _HOME.match(path) else path


def _with_home(text: str) -> str:
    r"""The path with a leading `~` or `~user` filled in. Raises UserError if there is no such user or home folder."""
    match = _HOME.match(text)
    if match is None:
        return text
    slashes, rest = match[1], text[len(match[1]) :]
    kept = slashes[: len(slashes) // 2]
    if len(slashes) % 2 or slashes:
        return kept + rest
    path = os.path.expanduser(text)  # noqa: PTH111  (pathlib raises RuntimeError for an unknown user)
    if path.startswith("/") and not (match[2] == "~" and os.environ.get("HOME") == ""):
        return path
    if match[2] != "~" and _fits(text) and _exists(text):
        return text
    what = "this user has no home folder" if match[2] == "~" else f"there is no user {shown(match[2][1:])}"
    raise UserError(f"{shown(text)}: {what}; write the whole path, or ./~ for a name", code="path.no_home")


def variable_value(name: str, default: str | None = None) -> str:
    """The value of an environment variable in a path. Raises UserError if it is not set, or not allowed in a path."""
    if SECRET.fullmatch(name.upper()) or not (name in VARIABLES or name.startswith("XDG_") or name.endswith(ENDINGS)):
        raise UserError(
            f"${shown(name)[1:-1]}: not a variable for paths; these are: {', '.join(VARIABLES)}, and names that end in "
            f"{', '.join(ENDINGS)}",
            code="path.variable_refused",
        )
    value = os.environ.get(name) or default
    if value is None:
        raise UserError(
            rf"${shown(name)[1:-1]}: this environment variable is not set; write \$ for a dollar sign",
            code="path.variable_unset",
        )
    return value


def checked(path: str) -> str:
    """The path, if a file system can hold it. Raises UserError for a NUL character and for a name that is too long."""
    if "\0" in path:
        raise UserError(f"{shown(path)}: a path cannot hold a NUL character", code="path.impossible")
    names = path.split("/")
    if too_long := next((name for name in names if _bytes(name) > LONGEST_NAME), None):
        raise UserError(f"{shown(too_long)}: a name in a path has at most {LONGEST_NAME} bytes", code="path.impossible")
    if _bytes(path) > LONGEST_PATH:
        raise UserError(f"{shown(path)}: a path has at most {LONGEST_PATH} bytes", code="path.impossible")
    return path


def _value(name: str, whole: str, literal: bool) -> str:
    match = _ENVIRONMENT.fullmatch(name)
    if match is None:
        raise UserError(
            rf"{shown(whole)}: expected ${{NAME}}, with the name of an environment variable; write \$ for a dollar sign",
            code="path.bad_reference",
        )
    try:
        return variable_value(match[1], match[2])
    except UserError:
        if literal:  # the file exists under just this name
            return whole
        raise


def _fits(text: str) -> bool:
    try:
        checked(text)
    except UserError:
        return False
    return True


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except UnicodeEncodeError:  # this locale's encoding has no such characters
        return False


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
