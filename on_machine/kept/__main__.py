"""What launches keep in the user's bucket for the next ones: packages, model files, 4-bit weights, the seconds of set-up.

    python3 -m on_machine.kept fetch-packages FOLDER TREE               an environment from FOLDER to TREE in the home folder
    python3 -m on_machine.kept fetch-model BUCKET UV OVERRIDES CONFIG   the model that these name, else from the hub
    python3 -m on_machine.kept keep-packages FOLDER TREE                the reverse, where FOLDER has none
    python3 -m on_machine.kept keep BUCKET SETTINGS                     after the first step keeps all that the bucket lacks

BUCKET/set-up/<model>.jsonl     a line for each of the newest launches, for `finetune plan`
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from on_machine.kept.four_bit import fetch_four_bit, keep_four_bit
from on_machine.kept.hub import SMALL, download
from on_machine.kept.manifests import DAMAGED, NOT_THERE, STATE, Damaged, Json, is_inside, say
from on_machine.kept.model_files import fetch_model, keep_model, model_kept
from on_machine.kept.packages import fetch_packages, keep_packages

KEPT_LAUNCHES = 20
COMMIT_LETTERS = 40
LOCK_VARIABLE = "FINETUNE_MODEL_LOCK"
"""The number of the file descriptor that on_machine/setup.sh has locked."""
DONE = STATE / "set-up.json"
KEYS = STATE / "packages.keys"
"""TREE KEY of the environments that set-up has installed from the index, a line each."""


def keep(bucket: Path, settings: Json) -> None:
    """settings: pid (of the job), model, revision, record (the name of the file below set-up/). What fails is reported, and the
    rest is tried all the same."""
    while not DONE.exists():
        if not Path(f"/proc/{settings['pid']}").exists():
            return
        time.sleep(1)
    tasks: list[Callable[[], None]] = [partial(record, bucket / "set-up" / settings["record"])]
    tasks += [partial(keep_packages, bucket / "packages" / key, tree) for tree, key in _installed()]
    tasks.append(partial(keep_four_bit, bucket))
    if len(settings["revision"] or "") == COMMIT_LETTERS:
        tasks.append(partial(keep_model, bucket, settings["model"], settings["revision"]))
    for task in tasks:
        try:
            task()
        except (OSError, ValueError, KeyError, Damaged) as error:
            say(f"not kept in the bucket: {error}")


def record(path: Path) -> None:
    """Adds this launch to those of the model."""
    found = json.loads(DONE.read_text(encoding="utf-8"))
    if not found["parts"]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [*lines, json.dumps(found)][-KEPT_LAUNCHES:]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def fetch(bucket: Path, uv: str, texts: list[str]) -> int:
    """The model that texts (overrides, config) name: what training needs, then the rest. Training needs the original weights only
    where their 4-bit copy is not kept."""
    if fetch_four_bit(bucket, texts[0], texts[-1]):
        if _from_bucket(bucket, texts, weights=False):
            download(texts, uv, SMALL)
        training_may_begin()
    code = _from_bucket(bucket, texts, weights=True)
    return download(texts, uv) if code else 0


def _from_bucket(bucket: Path, texts: list[str], *, weights: bool) -> int:
    try:
        kept = model_kept(bucket, texts)
        if kept is None:
            return NOT_THERE
        fetch_model(*kept, weights=weights)
        return 0
    except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
        say(f"the bucket's copy is not used: {error}")
        return DAMAGED


def training_may_begin() -> None:
    """Releases the one of set-up's two locks that a job waits for before it trains, and goes on at the lowest priority."""
    if descriptor := os.environ.get(LOCK_VARIABLE):
        os.close(int(descriptor))
    os.nice(19)


def _installed() -> list[tuple[str, str]]:
    rows = [line.split() for line in KEYS.read_text(encoding="utf-8").splitlines()] if KEYS.exists() else []
    return [(row[0], row[1]) for row in rows if len(row) == 2 and all(map(is_inside, row))]


def main(words: list[str]) -> int:
    command, place, *rest = words
    try:
        if command == "fetch-packages":
            return fetch_packages(Path(place), rest[0])
        if command == "fetch-model":
            uv, *texts = rest
            return fetch(Path(place), uv, texts)
        if command == "keep-packages":
            keep_packages(Path(place), rest[0])
        else:
            keep(Path(place), json.loads(rest[0]))
    except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
        say(f"the bucket's copy is not used: {error}")
        return DAMAGED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
