"""The wheel of this program as it is installed here, for a machine that cannot fetch it: built back from the installed files, or
from a checkout. The same files give the same bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from importlib import metadata
from pathlib import Path

from finetune.errors import UserError
from finetune.runtime.installed import PACKAGE, PROJECT, carried_files, files_below, in_checkout, install_command

PREFIX = f"{PROJECT.replace('-', '_')}-"
"""How the names of its wheels begin."""
_WHEEL = "Wheel-Version: 1.0\nGenerator: finetune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_BEGIN_OF_TIME = (1980, 1, 1, 0, 0, 0)


def own_wheel() -> tuple[str, bytes]:
    """Its file name and content. Raises UserError where the program runs without being installed."""
    name, files = _contents()
    record = _record(name, files)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in [*files, (f"{name}.dist-info/RECORD", record)]:
            entry = zipfile.ZipInfo(path, _BEGIN_OF_TIME)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return f"{name}-py3-none-any.whl", stream.getvalue()


def is_own_wheel(path: Path) -> bool:
    """Whether a wheel holds the files that are installed here. False also for one that cannot be read."""
    name, files = _contents()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"{name}.dist-info/RECORD") == _record(name, files)
    except (OSError, KeyError, zipfile.BadZipFile):
        return False


def _contents() -> tuple[str, list[tuple[str, bytes]]]:
    """Name and version as a wheel's file name has them, and all files but the record."""
    try:
        about = metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"finetune is not installed, so no wheel of it can be made for the machine; run `{install_command()}`",
            code="install.no_metadata",
        ) from None
    name = f"{PREFIX}{about.version}"
    files = [(f"finetune/{path.relative_to(PACKAGE).as_posix()}", path) for path in files_below(PACKAGE)]
    if in_checkout():
        root = PACKAGE.parent
        files += [(f"finetune/project/{path.relative_to(root).as_posix()}", path) for path in carried_files(root)]
    found = [(target, path.read_bytes()) for target, path in files]
    told = {part: about.read_text(part) for part in ("entry_points.txt", "top_level.txt")}
    told["METADATA"] = about.read_text("METADATA") or about.read_text("PKG-INFO")  # of an egg-info in a checkout
    told["WHEEL"] = _WHEEL
    found += [(f"{name}.dist-info/{part}", text.encode()) for part, text in told.items() if text]
    return name, sorted(found)


def _record(name: str, files: list[tuple[str, bytes]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for path, content in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((path, f"sha256={digest}", len(content)))
    writer.writerow((f"{name}.dist-info/RECORD", "", ""))
    return stream.getvalue().encode()
