"""How an attempt ends: with an adapter, with a checkpoint to resume from, or with a one-line error."""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from finetune.budget.lease import Lease
from finetune.checkpoint.folders import read_manifest
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, TakenOver, TransientError, UserError, first_line
from finetune.run_folder import RunFolder
from finetune.runtime import distributed, process_group
from finetune.runtime.commands import resume_command
from finetune.runtime.confined import remove_tree
from finetune.runtime.console import say
from finetune.runtime.files import disk_error
from finetune.training.adapter import adapter_from, adapter_is_of, remove_partial_files
from finetune.training.record.recorder import RunRecorder
from finetune.training.session import Session

HARD_STOP_SECONDS = 1.5
"""Time to write run.json and the adapter when the budget ends a hanging run; part of the meter's HARD_SECONDS."""
CLEAN_UP_SECONDS = 10.0
"""The same when another process has failed; shorter than the other ranks wait for rank 0 (runtime/distributed.py)."""


def refused(session: Session, refusal: str, before: str | None) -> int:
    """End an attempt whose budget does not reach the next save: the newest checkpoint becomes the adapter, and the run ends as
    stopped at its budget. Raises UserError if the run has already ended so, and if there is no checkpoint yet.

    before: the status of the run after the previous attempt.
    """
    step = session.resumed_step
    if step is None or (
        before == "budget_stop" and distributed.run_on_rank0(lambda: adapter_is_of(session.run, session.recorder, step))
    ):
        removed = _remove_not_started(session)
        if not removed and before != "budget_stop" and distributed.is_rank0():
            session.budget.book("failed")
            session.recorder.close("failed")
        where = "with --max-run-usd or --max-hours, or in the config" if removed else f"in {session.run.config_yaml}"
        raise UserError(f"{session.run.path}: {refusal} ({where})", code="budget.exhausted")
    say(refusal)
    if distributed.is_rank0():
        session.budget.book("budget_stop")
        assert session.resume_from
        adapter_from(session.run, session.resume_from, session.lease.check)
        session.recorder.stopped("budget", refusal, 0.0)
    return close(session, "budget_stop", step)


def already_there(session: Session) -> int:
    """End an attempt that has nothing to do: an earlier one has trained up to the step after which this one pauses, and was
    killed before it could say so. Nothing is loaded."""
    assert session.resume_from and session.resumed_step is not None
    if distributed.is_rank0():
        session.budget.book("paused")
        adapter_from(session.run, session.resume_from, session.lease.check)
    return close(session, "paused", session.resumed_step)


def close(session: Session, status: str, step: int) -> int:
    session.budget.end(status)
    session.recorder.close(status, adapter_step=None if status == "interrupted" else step)
    tell_end(session.run, status, step)
    return EXIT_TRANSIENT if status == "interrupted" else EXIT_OK


@contextmanager
def failures_recorded(session: Session) -> Iterator[None]:
    """Wraps the work of an attempt: a failure is recorded in run.json, and a foreseeable one becomes a UserError."""
    try:
        yield
    except BaseException as error:
        expected = _lost(session) or process_group.machine_lost(error) or foreseeable(error, session.run.path)
        close_failed(session, expected or error)
        if error is expected:
            raise
        if expected:
            raise expected from error
        raise


@contextmanager
def taken_over_first(session: Session) -> Iterator[None]:
    """A failure may only be the first sign that another attempt has taken over, such as a staged save that the other one has
    deleted. Then TakenOver is raised in its place."""
    try:
        yield
    except Exception as error:
        lost = _lost(session)
        if lost is None or lost is error:
            raise
        raise lost from error


def close_failed(session: Session, error: BaseException) -> None:
    """Record how the run ended and delete a partial adapter; delete the whole run folder if the run never began."""
    if not distributed.is_rank0():
        return
    status = "interrupted" if isinstance(error, KeyboardInterrupt | TransientError) else "failed"
    if _lost(session):  # the folder is another attempt's now, but what this one has cost counts all the same
        session.budget.end("taken over")
        return
    try:
        if _remove_not_started(session):
            return
        remove_partial_files(session.run)
        session.budget.end(status)
        session.recorder.close(status)
    except (OSError, UserError) as another:  # the original error is the one to report
        say(str(another))


def _lost(session: Session) -> TakenOver | None:
    """Why this attempt has no right to its run any more, looked up now."""
    with suppress(OSError, UserError):
        session.lease.check()
    return session.lease.lost


def clean_up(session: Session, code: int) -> None:
    """`close_failed` for a thread that is about to end this process with that code, because another one has failed or is gone."""
    transient = code == EXIT_TRANSIENT

    def end() -> None:
        with suppress(OSError, UserError):
            session.recorder.close("interrupted" if transient else "failed")  # before the ledger, which may be slow
        close_failed(session, TransientError("", code="distributed.machine_lost") if transient else RuntimeError())

    _within(CLEAN_UP_SECONDS, end)


def stop_hanging(run: RunFolder, recorder: RunRecorder, lease: Lease) -> None:
    """Called by a thread that is about to end a hanging process at its ceiling: the run ends at its newest checkpoint.

    The run's folder itself may hang, and a thread that writes there holds the record's lock: neither is waited for.
    """
    recorded = threading.Event()

    def end() -> None:
        try:
            recorder.close("budget_stop")
            recorded.set()
            if newest := recorder.newest:  # read once: a newer checkpoint may be committed meanwhile
                adapter_from(run, newest, lease.check)
                recorder.close("budget_stop", adapter_step=int(read_manifest(newest)["step"]))
        except Exception as error:  # any error: the process ends all the same
            what = run.adapter if recorded.is_set() else run.run_json
            say(f"{what}: not written ({first_line(error)}); `{resume_command(run.path)}` will write it")
            recorded.set()

    _within(HARD_STOP_SECONDS, end)
    if not recorded.is_set():
        say(f"{run.run_json}: not written, its folder does not respond; `{resume_command(run.path)}` will write it")


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Run the action in a thread and wait for it at most this long."""
    thread = threading.Thread(target=action, name="ending", daemon=True)
    thread.start()
    thread.join(seconds)


def _remove_not_started(session: Session) -> bool:
    """Delete the folder of a new run for which nothing was loaded yet; returns whether this is such a run."""
    not_started = session.record.attempts == 1 and session.record.hardware is None
    if not_started and distributed.is_rank0():
        session.lease.release()
        remove_tree(session.run.path, inside=session.run.path.parent, ignore_errors=True)
        with suppress(OSError):
            session.run.path.parent.rmdir()  # only if it is empty
    return not_started


def foreseeable(error: BaseException, folder: Path) -> UserError | None:
    """The UserError for a full disk, which safetensors and torch do not report as OSError, or for a full GPU; else None."""
    if isinstance(error, OSError):
        return disk_error(error, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "out of GPU memory outside a step's forward and backward passes, for example in validation, where no smaller "
            "micro-batch is tried: "
            "lower training.per_device_eval_batch_size, set training.max_memory_gib below what the GPU has, or lower "
            "model.max_seq_length",
            code="gpu.out_of_memory",
        )
    scratch = Path(tempfile.gettempdir())
    for place in (scratch, folder):
        full = place.exists() and shutil.disk_usage(place).free < 2**20
        if (isinstance(error, RuntimeError) and full) or "No space left" in str(error):
            where = scratch if full and place is scratch else folder
            return disk_error(OSError(errno.ENOSPC, str(error)), where)
    return None


def tell_end(run: RunFolder, status: str, step: int) -> None:
    say(
        {
            "done": f"{run.path}: done; the adapter is in {run.adapter}",
            "budget_stop": f"{run.path}: the budget is used up; the adapter of step {step} is in {run.adapter}",
            "paused": f"{run.path}: paused after step {step}, as asked, with a checkpoint",
            "interrupted": f"{run.path}: interrupted, a checkpoint is saved",
        }[status]
    )
