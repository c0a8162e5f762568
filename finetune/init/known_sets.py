"""Data sets in the layout of Spider or BIRD, as a folder or on the hub: which of their files train and which test."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import UserError
from finetune.runtime.files import LARGEST_FILE, parse_json, read_text
from finetune.runtime.paths import escaped

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TESTS = ("dev", "validation", "val", "test")
"""Question files whose names begin so are the test set, the first kind that is there; all others train."""


@dataclass(frozen=True)
class KnownSet:
    """revision: of a hub id. train, test: question files. records, questions: of them, None if unknown."""

    path: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    revision: str | None = None
    records: int | None = None
    questions: int | None = None
    left_out: tuple[str, ...] = field(default=())


ON_HUB = {
    "premai-io/spider": KnownSet(
        "premai-io/spider",
        ("train.json",),
        ("validation.json",),
        "2abe051bece3132d964271f79dc8589a84e63d06",
        7000,
        1034,
    )
}
"""Sets whose files are known here, with the commit that was looked at."""


def set_on_hub(text: str) -> KnownSet | None:
    """The set of a hub id such as premai-io/spider; None for a text that is no hub id. Raises UserError for one that is not known
    here."""
    if (
        not HUB_ID.fullmatch(text)
        or Path(text).exists()
        or Path(text).suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    ):
        return None
    if text in ON_HUB:
        return ON_HUB[text]
    raise UserError(
        f"--data {text}: no such file, and of the sets on the hub only {', '.join(ON_HUB)} is known here; download it (`hf "
        f"download {text} --repo-type dataset --local-dir {text.split('/')[1]}`) and give the folder",
        code="init.unknown_set",
    )


def set_in_folder(folder: Path) -> KnownSet:
    """Raises UserError unless the folder has question files and either databases or a file of tables."""
    files, broken = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("tables.json"):
            continue
        try:
            count = _questions(path)
        except (OSError, ValueError) as error:
            broken.append(f"{path.name} ({getattr(error, 'strerror', None) or error})")
            continue
        if count:
            files.append((path.name, count))
    has_schemas = any(folder.glob("*tables.json")) or (folder / "database").is_dir() or any(folder.glob("*_databases"))
    if not files or not has_schemas:
        why = f"; not readable: {', '.join(broken)}" if broken else ""
        raise UserError(
            f"--data {folder}: a folder, and not in the layout of Spider or BIRD (train_spider.json or dev.json, with "
            f"tables.json or database/){why}; give a file, such as a CSV of questions and SQL",
            code="init.no_known_set",
        )
    kind = next((start for start in TESTS if any(name.startswith(start) for name, _ in files)), None)
    test = [name for name, _ in files if kind and name.startswith(kind)]
    held_out = [name for name, _ in files if name.startswith(TESTS) and name not in test]
    train = [name for name, _ in files if name not in (*test, *held_out)]
    if not train:
        train, test = [name for name, _ in files], []
        held_out = []
    counts = dict(files)
    return KnownSet(
        str(folder.resolve()), tuple(train), tuple(test), None,
        sum(counts[name] for name in train), sum(counts[name] for name in test), tuple(held_out),
    )  # fmt: skip


def _questions(path: Path) -> int:
    """How many questions with their SQL a file holds; 0 for another kind of file. Raises OSError and ValueError."""
    content = parse_json(read_text(path, LARGEST_FILE))
    if not isinstance(content, list) or not content:
        return 0
    return len(content) if all(_is_question(entry) for entry in content[:100]) else 0


def _is_question(entry: object) -> bool:
    return isinstance(entry, dict) and {"question", "db_id"} <= entry.keys() and bool({"query", "SQL"} & entry.keys())


def source_lines(known: KnownSet) -> list[str]:
    """The entries of data.sources, in YAML's flow style, which JSON is part of."""
    where = {"kind": "spider", "path": known.path if known.revision else escaped(known.path)} | (
        {"revision": known.revision} if known.revision else {}
    )
    found = [_flow(where | {"files": list(known.train)})]
    if known.test:
        found.append(_flow(where | {"files": list(known.test), "split": "test"}))
    return found


def _flow(entry: dict[str, object]) -> str:
    return "{" + ", ".join(f"{key}: {_value(value)}" for key, value in entry.items()) + "}"


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    text = str(value)
    return text if _is_plain(text) else json.dumps(text, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) is not None and text not in _WORDS


_WORDS: Sequence[str] = (
    "true",
    "false",
    "null",
    "yes",
    "no",
    "on",
    "off",
    "True",
    "False",
    "Null",
    "Yes",
    "No",
    "On",
    "Off",
)
