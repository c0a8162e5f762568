"""One live attempt of a run at a time: the lease in the run's folder, which may be a bucket.

The live attempt overwrites its claim (claims.py) every few seconds. Another one takes over only when the run is free:
- the live attempt has ended and says so, or
- it ran on this machine and its process is gone, or
- its claim has not changed for the length of the lease, measured by the observer's own clock. Clocks are never compared, so it
  does not matter what time a machine thinks it is.

No rename, lock or exclusive creation is relied on. Two that start at once see each other's claims after SETTLE_SECONDS at the
latest, and the one with the lower claim goes on. An attempt that was only paused, or cut off from the bucket, finds a higher
claim when it comes back and stops (`check`, before every write). What it commits in the moment between a check and a write does
not count: a claim lists the checkpoints at its takeover, and others of earlier attempts are passed over (`too_late`).
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from finetune.budget.claims import ANY, Claim, ClaimFolder, Claims, Key
from finetune.budget.takeover import LEASE_SECONDS, SETTLE_SECONDS, Heritage, Timing, above, acquiring
from finetune.errors import TakenOver, TransientError, UserError
from finetune.machine.process import is_gone, this_process
from finetune.run_folder import RunFolder, remove_not_started

LEASE_VARIABLE = "FINETUNE_LEASE_SECONDS"
LOCAL_SETTLE_SECONDS = 0.05
UNSURE_SECONDS = 300.0
"""An attempt that cannot renew its lease for so long ends: another one may have taken over, and each would spend the rest."""
RELEASE_SECONDS = 2.0
SHARED_TYPES = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "beegfs", "gpfs")

_held_here: set[str] = set()
"""Tokens of the claims that this process holds."""


class Lease:
    """The lease of one attempt. Before `acquire`, and on all ranks but the first, its methods do nothing.

    Use as a context manager: it releases the lease at the end. say: prints one line for the user. It is a Fence for the store.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] | None = None) -> None:
        self._say, self._clock = say, clock or _steady_seconds
        self._claims: Claims | None = None
        self._claim: Claim | None = None
        self._earlier: tuple[Claim, ...] = ()
        self._lost: TakenOver | None = None
        self._looked = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def number(self) -> int:
        return self._claim.number if self._claim else 0

    @property
    def lost(self) -> TakenOver | None:
        """Why this attempt has no right to its run any more; None while it has."""
        return self._lost

    def acquire(self, run: RunFolder, heritage: Callable[[], Heritage]) -> bool:
        """Take the lease, waiting while that is sensible; returns whether it had to wait. Raises UserError if another attempt
        holds it."""
        folder = ClaimFolder(run.lease)
        folder.create()
        lease = lease_seconds()
        timing = Timing(lease, min(settle_seconds(run.path), lease / 10))
        process, task = this_process(), os.environ.get("SKYPILOT_TASK_ID", "")
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        wanted = Claim(0, secrets.token_hex(8), "candidate", process, lease, 0, since, task)
        told: set[Key] = set()

        def waits(other: Claim) -> None:
            if other.key not in told:
                told.add(other.key)
                self._say(
                    f"{run.path}: an earlier attempt ({other.who()}) has not said that it ended; waiting up to "
                    f"{max(lease, other.seconds):.0f} s for a sign of life"
                )

        _held_here.add(wanted.token)
        try:
            claim = _driven(
                acquiring(folder, wanted, timing, clock=self._clock, gone=_gone, heritage=heritage, waits=waits)
            )
        except BaseException as error:
            _held_here.discard(wanted.token)
            if isinstance(error, UserError) and error.code == "run.held":
                raise type(error)(f"{run.path}: {error}", code="run.held") from None
            raise
        self.begin(folder, claim)
        self._thread = threading.Thread(target=self._keep, args=(timing.beat,), name="lease", daemon=True)
        self._thread.start()
        return bool(told)

    def begin(self, claims: Claims, claim: Claim) -> None:
        """Hold a claim that is live, without a thread that renews it."""
        self._claims, self._claim, self._looked = claims, claim, self._clock()
        self._earlier = tuple(claims.read(key) for key in claims.listed() if key < claim.key)

    def beat(self) -> None:
        """Renew the lease, unless it is lost. Raises UserError if the claim cannot be written or the others cannot be read."""
        with self._lock:
            if self._claim is None or self._claims is None or self._closing.is_set():
                return
            self._look()  # first: an attempt that was paused writes nothing any more
            if self._lost is None:
                self._claim = replace(self._claim, beat=self._claim.beat + 1)
                self._claims.write(self._claim)

    def check(self, max_age: float = 0.0) -> None:
        """Raises TakenOver if another attempt has taken over. max_age: trust a look that is at most so many seconds old."""
        if self._lost is None and self._claim is not None and not self._clock() - self._looked <= max_age:
            self._look()
        if self._lost is not None:
            raise self._lost

    def check_pulse(self) -> None:
        """`check` without reading anything, for the training loop. Raises TransientError, too, if the lease could not be renewed
        for UNSURE_SECONDS."""
        if self._lost is not None:
            raise self._lost
        if self._claim is None or self._closing.is_set():
            return
        silent = self._clock() - self._looked
        if silent > UNSURE_SECONDS:
            raise TransientError(
                f"the run's folder could not be reached for {silent:.0f} s, so another attempt may have taken over: this one "
                "ends; the staged save stays on this machine",
                code="run.lease_not_renewed",
            )

    def too_late(self, name: str, number: int, seal: str) -> bool:
        """Whether an attempt had already lost the run when it committed a checkpoint (checkpoint/fence.py)."""
        if not number:  # saved by a version without leases
            return False
        mine = (self._claim,) if self._claim else ()
        later = [claim for claim in (*self._earlier, *mine) if claim.took_over and claim.number > number]
        return any(claim.inherits.get(name) not in (seal, ANY) for claim in later)

    def release(self) -> None:
        """Say that this attempt has ended, so that the next one need not wait; nothing if it is lost. Never raises, and does not
        wait long for a bucket that does not answer. A second call does nothing."""
        if self._claim is None or self._closing.is_set():
            return
        self._closing.set()
        ending = threading.Thread(target=self._end, name="lease end", daemon=True)
        ending.start()
        ending.join(RELEASE_SECONDS)

    def _end(self) -> None:
        with self._lock, suppress(UserError):
            assert self._claim is not None and self._claims is not None
            _held_here.discard(self._claim.token)
            if self._lost is None:
                self._claim = replace(self._claim, state="ended")
                self._claims.write(self._claim)

    def _look(self) -> None:
        assert self._claims is not None and self._claim is not None
        began = self._clock()
        others = [claim for claim in above(self._claims, self._claim.key) if claim.took_over]
        if others:
            self._lost = TakenOver(
                f"another attempt has taken over this run ({others[-1].who()}): this one stops and saves nothing more",
                code="run.taken_over",
            )
        self._looked = began

    def _keep(self, seconds: float) -> None:
        """The thread that renews the lease."""
        fault = ""
        while not self._closing.wait(seconds) and self._lost is None:
            try:
                self.beat()
                fault = ""
            except Exception as error:
                if not fault:
                    fault = str(error)
                    self._say(f"the run's lease is not renewed and is retried every {seconds:.0f} s: {fault}")


def clear_not_started(run: RunFolder, say: Callable[[str], None]) -> None:
    """Remove the folder of a run that was killed before its first record, unless an attempt is just starting there. Raises
    UserError for such an attempt, and where the folder holds anything else."""
    if not run.path.is_dir() or run.run_json.exists():
        return
    if run.lease.is_dir():
        with Lease(say) as lease:
            lease.acquire(run, lambda: ({}, 0))
            if run.run_json.exists():
                return
            lease.release()
            remove_not_started(run)
    else:
        remove_not_started(run)


def lease_seconds() -> float:
    """FINETUNE_LEASE_SECONDS, for tests; else 60. Raises UserError if it is not a number above 0 and at most 600."""
    text = os.environ.get(LEASE_VARIABLE)
    with suppress(ValueError):
        seconds = float(text) if text else LEASE_SECONDS
        if 0 < seconds <= 10 * LEASE_SECONDS:
            return seconds
    raise UserError(
        f"{LEASE_VARIABLE}: expected seconds above 0 and at most {10 * LEASE_SECONDS:g}, found {str(text)[:40]!r}",
        code="run.bad_lease_seconds",
    )


def settle_seconds(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> float:
    """How long a new file may be invisible to others: on a local disk hardly at all."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return SETTLE_SECONDS
    resolved = folder.resolve()
    found = [
        (len(point.parts), words[2])
        for words in lines
        if len(words) > 2 and ((point := Path(words[1])) == resolved or point in resolved.parents)
    ]
    kind = max(found)[1] if found else ""
    shared = not kind or kind in SHARED_TYPES or (kind.startswith("fuse") and "overlay" not in kind)
    return SETTLE_SECONDS if shared else LOCAL_SETTLE_SECONDS


def _gone(claim: Claim) -> bool:
    if claim.state == "unknown":
        return False
    mine = this_process()
    same = (claim.process.machine, claim.process.pid, claim.process.started) == (mine.machine, mine.pid, mine.started)
    return is_gone(claim.process) or (bool(mine.machine) and same and claim.token not in _held_here)


def _driven(steps: Generator[float, None, Claim]) -> Claim:
    while True:
        try:
            time.sleep(next(steps))
        except StopIteration as end:
            claim: Claim = end.value
            return claim


def _steady_seconds() -> float:
    """Goes on while a machine sleeps, and is never set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
