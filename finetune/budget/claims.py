"""The claims to a run: one small file an attempt in the folder `lease` of the run, written by that attempt alone.

lease/claim-NUMBER-TOKEN.json    NUMBER grows with every attempt, and orders the attempts; TOKEN is random

A claim is overwritten as a whole and never renamed, so it needs nothing of a file system but that a small file can be written and
later read. A reader may see an old version of it, or half of one: the name alone says what matters then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.errors import UserError
from finetune.machine.process import ProcessId
from finetune.runtime.confined import remove_file
from finetune.runtime.files import disk_error, names_in

State = Literal["candidate", "live", "ended", "withdrawn", "unknown"]
STATES = ("candidate", "live", "ended", "withdrawn")
MOST_CLAIMS = 10**9 - 1
LONGEST_LEASE_SECONDS = 3600.0
"""A longer one in a file is damage."""
BLOCK_BYTES = 1024
"""A claim is padded to a multiple of it: its length stays the same as its numbers grow."""
ANY = "*"
"""In `inherits`: a checkpoint whose manifest could not be read at the takeover."""
_NAME = re.compile(r"claim-([0-9]{6,9})-([0-9a-f]{16})\.json")
_TEXT_LENGTH = 200

Key = tuple[int, str]
"""(number, token): the order of the claims."""


@dataclass(frozen=True)
class Claim:
    """state: candidate until it is clear that no other attempt is alive; then live, until the attempt ends. Withdrawn: it never
    was live. Unknown: the file cannot be read now.

    beat: grows with every heartbeat. seconds: for how long an unchanged beat means that the attempt is alive. since: UTC, for
    people. task: SkyPilot's id of the task, the same for all recoveries of a managed job. inherits: of a claim that was live, the
    checkpoints at its takeover (folder's name -> hash of the manifest): later commits of earlier attempts do not count.
    """

    number: int
    token: str
    state: State
    process: ProcessId
    seconds: float
    beat: int = 0
    since: str = ""
    task: str = ""
    inherits: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.number, self.token

    @property
    def took_over(self) -> bool:
        """Whether this attempt is or was the live one, so that earlier ones have lost the run."""
        return self.state in ("live", "ended")

    def who(self) -> str:
        since = f", since {self.since}" if self.since else ""
        return f"machine {self.process.host or '?'}, process {self.process.pid}{since}"


class Claims(Protocol):
    """The claims of a run. Tests use one that shows changes late."""

    def listed(self) -> list[Key]:
        """In order, the newest last. Raises UserError if the folder cannot be read."""

    def read(self, key: Key) -> Claim:
        """Never raises: a claim that cannot be read is `unknown`."""

    def write(self, claim: Claim) -> None:
        """Raises UserError."""


class ClaimFolder:
    """The claims in a folder, which `create` makes. The methods are those of Claims."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def listed(self) -> list[Key]:
        names = names_in(self.folder)
        return sorted((int(match[1]), match[2]) for name in names if (match := _NAME.fullmatch(name)))

    def read(self, key: Key) -> Claim:
        try:
            with self._path(key).open("rb") as file:
                return _decoded(key, json.loads(file.read()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return unknown(key)

    def write(self, claim: Claim) -> None:
        """Overwrites the same bytes, which needs no room on a full disk. The folder is not created again: without it, the bucket
        may have lost its mount."""
        path = self._path(claim.key)
        content = (json.dumps(asdict(claim), indent=1) + "\n").encode()
        content = content.ljust(-(-len(content) // BLOCK_BYTES) * BLOCK_BYTES)
        new = not path.exists()
        try:
            with path.open("wb" if new else "r+b", buffering=0) as file:
                file.write(content)
        except OSError as error:
            if new:
                with suppress(OSError):
                    remove_file(path, inside=self.folder)
            raise disk_error(error, path) from error

    def _path(self, key: Key) -> Path:
        return self.folder / f"claim-{key[0]:06d}-{key[1]}.json"


def next_number(keys: list[Key], least: int) -> int:
    """One more than every number so far, and than `least`. Raises UserError if there is none."""
    number = 1 + max([least, *(number for number, _ in keys)])
    if number > MOST_CLAIMS:
        raise UserError(
            f"lease: a claim has the number {number - 1}, which no run reaches; delete the folder lease of the run if no "
            "attempt of it is running",
            code="run.bad_lease",
        )
    return number


def unknown(key: Key) -> Claim:
    return Claim(*key, state="unknown", process=ProcessId("", 0, 0, ""), seconds=0.0)


def _decoded(key: Key, values: dict[str, Any]) -> Claim:
    """Checked here, where it is read: the seconds bound a wait, and the texts are printed. Raises for anything else."""
    process, seconds, beat = values["process"], values["seconds"], values["beat"]
    numbers = (process["pid"], process["started"], beat)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or values["state"] not in STATES:
        raise ValueError(values)
    if isinstance(seconds, bool) or not 0 < float(seconds) <= LONGEST_LEASE_SECONDS:
        raise ValueError(seconds)
    inherits = {str(name): str(seal) for name, seal in values["inherits"].items()}
    who = ProcessId(str(process["machine"]), process["pid"], process["started"], _text(process["host"]))
    since, task = _text(values["since"]), _text(values["task"])
    return Claim(*key, values["state"], who, float(seconds), beat, since, task, inherits)


def _text(value: object) -> str:
    return "".join(letter for letter in str(value)[:_TEXT_LENGTH] if letter.isprintable())
