"""Writes checkpoints to the store in the background: training submits a staged save on the local disk and continues.

One thread copies and commits. While it is busy, only the newest submitted save waits. A save that fails stays on the local
disk and is retried until a newer one replaces it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoint.folders import read_manifest
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import TakenOver, UserError
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import disk_error

PATIENCE = 3
"""Failed saves in a row after which training stops: it would spend money on progress that it cannot save."""
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 4.0  # shorter than the other ranks wait for rank 0 (runtime/distributed.py)


@dataclass(frozen=True)
class Committed:
    """A checkpoint in the store. seconds: from `submit` to its commit. bytes: total size of its files."""

    step: int
    folder: Path
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Save:
    staged: Path
    step: int
    config_hash: str
    data_hash: str
    attempt: int
    submitted: float  # time.monotonic()


class AsyncCheckpointWriter:
    """say: prints one line for the user. on_commit: called after every commit. The writer's thread may call both.

    The thread is a daemon: the process does not wait for it at exit, and a copy in progress then becomes an incomplete save.
    """

    def __init__(
        self,
        store: CheckpointStore,
        say: Callable[[str], None],
        on_commit: Callable[[Committed], None] = lambda committed: None,
    ) -> None:
        self._store, self._say, self._on_commit = store, say, on_commit
        self._changed = threading.Condition()
        self._waiting: _Save | None = None
        self._running: _Save | None = None
        self._failed: _Save | None = None  # the newest save tried, if it failed
        self._fault: UserError | None = None
        self._failures = 0  # failed saves in a row; retries of one save count once
        self._committed: Committed | None = None
        self._closing = self._closed = False
        self._thread: threading.Thread | None = None
        self._submitted = 0
        self._deleting: list[threading.Thread] = []

    def submit(self, staged: Path, *, step: int, config_hash: str, data_hash: str, attempt: int) -> None:
        """Submit a staged save, a folder that is deleted after its commit or when a newer one replaces it. Returns immediately.

        The folder is renamed, so that saving the same step again does not write into the files being copied. Raises UserError
        when it does not exist.
        """
        save = _Save(self._claim(staged), step, config_hash, data_hash, attempt, time.monotonic())
        with self._changed:
            if self._closing:
                raise RuntimeError("submit after close")
            dropped, self._waiting, running = self._waiting, save, self._running
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if dropped is not None:
            self._deleting.append(_delete_in_background(dropped.staged))
        if running is not None:
            instead = f" in place of step {dropped.step}, which is dropped" if dropped else ""
            self._tell(f"step {running.step} is still being copied; step {step} waits{instead}")

    def check(self) -> None:
        """Raises UserError once PATIENCE saves in a row have failed. Cheap enough to call at every step."""
        if isinstance(self._fault, TakenOver):
            raise self._fault
        if self._failures >= PATIENCE:
            with self._changed:
                if self._failures >= PATIENCE:
                    raise self._given_up(f"{self._failures} saves in a row have failed")

    def finish(self, timeout: float | None = None) -> Committed | None:
        """Wait until the newest staged save is committed, retrying once if it failed; None if nothing was submitted.

        Raises UserError when it cannot be committed, or is not committed within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._closing:
                raise RuntimeError("finish after close")
            self._wait_until_idle(deadline, timeout)
            if self._failed is not None and not isinstance(self._fault, TakenOver):
                self._waiting = self._failed
                self._changed.notify_all()
                self._wait_until_idle(deadline, timeout)
            if isinstance(self._fault, TakenOver):
                raise self._fault
            if self._failed is not None:
                raise self._given_up("tried twice")
            return self._committed

    def close(self) -> None:
        """End the thread, waiting up to CLOSE_SECONDS for the running and the waiting copy. A save that is not committed by then
        is reported, and its staged folder stays. May be called twice."""
        with self._changed:
            already, self._closing = self._closing, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        for thread in self._deleting:
            thread.join(CLOSE_SECONDS)
        with self._changed:
            self._closed = True
            left = self._waiting or self._running or self._failed
        if left is not None and not already and not isinstance(self._fault, TakenOver):
            self._tell(f"step {left.step} is not in {self._store.root}; its staged save stays in {left.staged}")

    def _claim(self, staged: Path) -> Path:
        self._submitted += 1
        try:
            return staged.rename(staged.with_name(f"{staged.name}.save-{self._submitted}"))
        except OSError as error:
            raise disk_error(error, staged) from error

    def _wait_until_idle(self, deadline: float | None, timeout: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._changed.wait_for(lambda: not (self._waiting or self._running), left):
            save = self._waiting or self._running
            assert save is not None
            raise UserError(
                f"{self._store.root}: step {save.step} was not saved within {timeout:g} s; its staged save is in {save.staged}",
                code="checkpoint.timeout",
            )

    def _given_up(self, how_often: str) -> UserError:
        assert self._failed is not None and self._fault is not None
        return UserError(
            f"{self._fault} ({how_often}; step {self._failed.step} is kept in {self._failed.staged})",
            code=self._fault.code,
        )

    def _work(self) -> None:
        while (save := self._next()) is not None:
            fault, committed = None, None
            try:
                committed = self._commit(save)
            except UserError as error:
                fault = error
            except Exception as error:  # any error must reach training and `finish`
                fault = UserError(
                    f"{self._store.root}: step {save.step} could not be saved ({error!r})",
                    code="checkpoint.save_failed",
                )
            if committed is not None:
                self._after_commit(save, committed)
            self._settle(save, committed, fault)

    def _next(self) -> _Save | None:
        """The next save to try; None when the writer closes."""
        with self._changed:
            again = None if self._failed is None else time.monotonic() + RETRY_SECONDS
            while True:
                if self._waiting is not None and not self._closed:
                    self._running, self._waiting = self._waiting, None
                    return self._running
                if self._closing:
                    return None
                if again is not None and time.monotonic() >= again:
                    self._running = self._failed
                    return self._running
                self._changed.wait(None if again is None else max(0.0, again - time.monotonic()))

    def _commit(self, save: _Save) -> Committed:
        folder = self._store.put(
            save.staged,
            step=save.step,
            config_hash=save.config_hash,
            data_hash=save.data_hash,
            attempt=save.attempt,
        )
        seconds = time.monotonic() - save.submitted
        size = sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())
        return Committed(save.step, folder, seconds, size)

    def _after_commit(self, save: _Save, committed: Committed) -> None:
        """The checkpoint is committed, whatever fails here."""
        for action in (lambda: self._on_commit(committed), self._store.prune):
            try:
                action()
            except TakenOver:
                pass  # reported by the training loop
            except Exception as error:
                self._tell(
                    f"after the save of step {save.step}: {error if isinstance(error, UserError) else repr(error)}"
                )
        _delete(save.staged)

    def _settle(self, save: _Save, committed: Committed | None, fault: UserError | None) -> None:
        earlier, again = self._failed, self._failed is save  # only this thread changes it
        if earlier is not None and not again:  # a newer state is committed, or at least staged
            _delete(earlier.staged)
        if fault is not None and not again and not isinstance(fault, TakenOver):
            self._tell(
                f"step {save.step} is not saved: {fault}; its staged save is kept in {save.staged} and will be retried"
            )
        with self._changed:
            if fault is None:
                self._failed, self._fault, self._failures, self._committed = None, None, 0, committed
            else:
                self._failed, self._fault, self._failures = save, fault, self._failures + (not again)
            self._running = None
            self._changed.notify_all()

    def _tell(self, line: str) -> None:
        try:
            self._say(line)
        except Exception:  # a closed console must not stop the writer
            pass


def _delete_in_background(folder: Path) -> threading.Thread:
    """Deleting large files takes a while, even on a local disk."""
    thread = threading.Thread(target=_delete, args=(folder,), daemon=True)
    thread.start()
    return thread


def _delete(staged: Path) -> None:
    remove_tree(staged, inside=staged.parent, ignore_errors=True)
