"""What a prepared set was made of: the part of a config's section `data` that its manifest names.

`data.prepare` writes it there, and whoever uses the set for a config compares the two. Settings that change nothing in the set,
such as its own folder, are not compared, nor are those that the manifest of an earlier version lacks.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.config.schema import DataSection, SourceSection
from finetune.errors import UserError, shown
from finetune.prepared_folder import MANIFEST, SOURCES
from finetune.runtime.files import load_json, sha256_file
from finetune.sql.dialects import dialect_name

COMPARED = ("seed", "split_by", "val_fraction", "test_fraction", "max_train_records")
STATEMENTS = "statements"
"""Only in the manifest where it is not `all`, so that sets of versions without the key stay the same."""
PLACES = ("path", "databases")


def settings_of(data: DataSection, max_seq_length: int) -> dict[str, Any]:
    """The settings of a set, as its manifest has them. max_seq_length: in tokens, for its counts alone; not compared."""
    statements = {} if data.statements == "all" else {STATEMENTS: data.statements}
    return {name: getattr(data, name) for name in COMPARED} | {"max_seq_length": max_seq_length} | statements


def differences(data: DataSection, manifest: Mapping[str, Any]) -> list[str]:
    """Where a set is not what `finetune data prepare` would make of this section now: one text a key, empty if nowhere."""
    before, found = manifest.get("settings"), []
    if isinstance(before, Mapping):
        before = {STATEMENTS: "all", **before}
        found = [
            _text(f"data.{name}", before[name], getattr(data, name))
            for name in (*COMPARED, STATEMENTS)
            if name in before and before[name] != getattr(data, name)
        ]
    return [*found, *_differing_sources(data.sources, manifest.get("sources"))]


def changed_sources(folder: Path) -> list[str]:
    """The files that a set was made of and that have changed since. Those that are not here are not compared, nor those of a set
    that an earlier version prepared."""
    try:
        hashes = load_json(folder / SOURCES)
        return [file for file, sha256 in hashes.items() if Path(file).is_file() and sha256_file(Path(file)) != sha256]
    except (OSError, ValueError, AttributeError):
        return []


def is_prepared_from(folder: Path, data: DataSection) -> bool:
    """Whether there is a set in a folder that the section describes; also where its manifest cannot be read, which whoever reads
    more of it says."""
    try:
        return not differences(data, load_json(folder / MANIFEST)) and not changed_sources(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, AttributeError):
        return True


def check_prepared_from(folder: Path, manifest: Mapping[str, Any], data: DataSection) -> None:
    """Raises UserError for a set that the section does not describe, or whose sources have changed."""
    if found := differences(data, manifest):
        raise UserError(
            f"{folder}: was prepared with {'; with '.join(found)}; run `finetune data prepare CONFIG` with the same overrides, "
            "or set data.output_dir to another prepared set",
            code="data.other_settings",
        )
    if changed := changed_sources(folder):
        raise UserError(
            f"{folder}: was prepared before {', '.join(changed)} changed; run `finetune data prepare CONFIG` again",
            code="data.source_changed",
        )


def _differing_sources(sources: list[SourceSection], before: Any) -> Iterator[str]:
    if not isinstance(before, list) or not all(isinstance(one, Mapping) for one in before):
        return
    if len(before) != len(sources):
        yield _text("the number of data.sources", len(before), len(sources))
        return
    for number, (source, then) in enumerate(zip(sources, before, strict=True)):
        now = asdict(source)
        for name in (name for name in now if name in then):
            if not _same(name, now, then):
                yield _text(f"data.sources[{number}].{name}", then[name], now[name])


def _same(name: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    first, second = (_databases(one) if name == "databases" else one[name] for one in (then, now))
    if first == second or not (isinstance(first, str) and isinstance(second, str)):
        return bool(first == second)
    if name == "dialect":
        return _dialect(first) == _dialect(second)
    on_hub = now.get("revision") is not None or then.get("revision") is not None
    return name in PLACES and not (name == "path" and on_hub) and _same_place(first, second)


def _databases(source: Mapping[str, Any]) -> Any:
    """Spider's own folder of databases need not be named."""
    if source["databases"] is None and source.get("kind") == "spider" and source.get("revision") is None:
        return f"{source.get('path')}/database"
    return source["databases"]


def _dialect(name: str) -> str:
    try:
        return dialect_name(name)
    except UserError:
        return name


def _same_place(then: str, now: str) -> bool:
    """Whether two paths mean one file or folder, or copies of it, as far as that can be told here: one may be of another
    computer, or count from another folder, and then the names at their ends have to do."""
    first, second = Path(os.path.normpath(then)), Path(os.path.normpath(now))
    if first == second:
        return True
    try:
        return first.samefile(second) or _same_content(first, second)
    except (OSError, ValueError):
        pass  # one of them is not here
    if first.is_absolute() and second.is_absolute():
        return first.name == second.name
    ends = [[part for part in path.parts if part not in ("..", path.anchor)] for path in (first, second)]
    length = min(map(len, ends))
    return length > 0 and ends[0][-length:] == ends[1][-length:]


def _same_content(first: Path, second: Path) -> bool:
    """Of folders, the names in them."""
    if first.is_dir() and second.is_dir():
        return {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def _text(key: str, then: Any, now: Any) -> str:
    return f"{key} {_value(then)}, this config has {_value(now)}"


def _value(value: Any) -> str:
    return shown(value) if isinstance(value, str) else json.dumps(value)[:100]
