"""Who works on a sweep: one claim each in its folder `workers`, as those of a run's attempts (budget/claims.py).

A worker is dead if it says that it has ended, if its process on this machine is gone, if it is an earlier machine of this managed
job, or if its claim has not changed for the length of a lease, by this worker's clock.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from finetune.budget.claims import Claim, ClaimFolder, next_number
from finetune.budget.lease import lease_seconds, settle_seconds
from finetune.budget.takeover import Observer, Timing
from finetune.errors import UserError
from finetune.machine.process import is_gone, this_process


class Worker:
    """This process as a worker of the sweep in `folder`. Use as a context manager: its claim is renewed until the end."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError like `lease_seconds`."""
        lease = lease_seconds()
        self._claims = ClaimFolder(folder / "workers")
        self._timing = Timing(lease, min(settle_seconds(folder), lease / 10))
        self._observer = Observer(self._timing, time.monotonic, _gone)
        process, task = this_process(), os.environ.get("SKYPILOT_TASK_ID", "")
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._claim = Claim(0, secrets.token_hex(8), "live", process, lease, 0, since, task)
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="worker", daemon=True)

    @property
    def token(self) -> str:
        return self._claim.token

    @property
    def settle(self) -> float:
        """Seconds after which every other worker sees a new file."""
        return self._timing.settle

    def __enter__(self) -> Worker:
        """Raises UserError if the claim cannot be written."""
        self._claims.folder.parent.mkdir(parents=True, exist_ok=True)
        self._claims.create()
        self._claim = replace(self._claim, number=next_number(self._claims.listed(), 0))
        self._claims.write(self._claim)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._lock, suppress(UserError):
            self._claims.write(replace(self._claim, state="ended"))

    def alive(self, tokens: Collection[str]) -> dict[str, Claim]:
        """Of these workers, those that may be alive."""
        found = [self._claims.read(key) for key in self._claims.listed() if key[1] in tokens and key[1] != self.token]
        return {claim.token: claim for claim in found if not self._is_dead(claim)}

    def wait_for_signs(self, tokens: Collection[str]) -> dict[str, Claim]:
        """`alive`, after as long as it takes to be sure: at most the length of a lease."""
        began = time.monotonic()
        while True:
            alive = self.alive(tokens)
            seen = [claim for claim in alive.values() if self._observer.was_seen_alive(claim)]
            if len(seen) == len(alive) or time.monotonic() - began > 2 * self._timing.lease:
                return alive
            time.sleep(self._timing.poll)

    def _is_dead(self, claim: Claim) -> bool:
        if claim.state == "ended":
            return True
        if self._claim.task and claim.task == self._claim.task:
            return True
        return self._observer.is_dead(claim)

    def _keep(self) -> None:
        while not self._closing.wait(self._timing.beat):
            with self._lock, suppress(UserError):  # a bucket that does not answer: others will take over
                if not self._closing.is_set():
                    self._claim = replace(self._claim, beat=self._claim.beat + 1)
                    self._claims.write(self._claim)


def _gone(claim: Claim) -> bool:
    return claim.state != "unknown" and is_gone(claim.process)
