"""How an attempt ends: with an adapter, with a checkpoint to go on from, or with one line about what went wrong."""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from finetune.checkpoint.store import read_manifest
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError, first_line
from finetune.run_folder import RunFolder
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.files import disk_error
from finetune.training.adapter import adapter_from, adapter_is_of, remove_partial_files
from finetune.training.record import RunRecorder
from finetune.training.session import Session

HARD_STOP_SECONDS = 1.5
"""For run.json and the adapter where the budget ends a run that hangs, of the meter's HARD_SECONDS before the ceiling."""
CLEAN_UP_SECONDS = 10.0
"""For the same where another process has failed; less than the others wait for the first (runtime/distributed.py)."""


def refused(session: Session, refusal: str, before: str | None) -> int:
    """The budget does not pay for another save. What an earlier attempt has learned becomes the adapter, and the run has stopped
    at its budget. Raises UserError where somebody wants more of it all the same, and where nothing was learned yet.

    before: the status that the attempt before this one has left.
    """
    step = session.resumed_step
    if step is None or (
        before == "budget_stop" and distributed.run_on_rank0(lambda: adapter_is_of(session.run, session.recorder, step))
    ):
        if not _remove_not_started(session) and before != "budget_stop" and distributed.is_rank0():
            session.spending.book("failed")
            session.recorder.close("failed")
        raise UserError(f"{session.run.path}: {refusal} (in {session.run.config_yaml})", code="budget.exhausted")
    say(refusal)
    if distributed.is_rank0():
        session.spending.book("budget_stop")
        assert session.resume_from
        adapter_from(session.run, session.resume_from)
        session.recorder.stopped("budget", refusal, 0.0)
    return close(session, "budget_stop", step)


def close(session: Session, status: str, step: int) -> int:
    session.spending.end(status)
    session.recorder.close(status, adapter_step=None if status == "interrupted" else step)
    tell_end(session.run, status, step)
    return EXIT_TRANSIENT if status == "interrupted" else EXIT_OK


@contextmanager
def failures_recorded(session: Session) -> Iterator[None]:
    """Around the work of an attempt: where it fails, run.json says so. A fault that can be foreseen becomes a UserError."""
    try:
        yield
    except BaseException as error:
        expected = foreseeable(error, session.run.path)
        close_failed(session, error)
        if expected:
            raise expected from error
        raise


def close_failed(session: Session, error: BaseException) -> None:
    """Leave a run folder that says how the run ended, without half an adapter; none at all if the run never began."""
    if not distributed.is_rank0():
        return
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    try:
        if _remove_not_started(session):
            return
        remove_partial_files(session.run)
        session.spending.end(status)
        session.recorder.close(status)
    except (OSError, UserError) as another:  # the fault that brought us here is the one to report
        say(str(another))


def clean_up(session: Session) -> None:
    """`close_failed` for a thread that is about to end the process, because another one has failed."""
    _within(CLEAN_UP_SECONDS, lambda: close_failed(session, RuntimeError()))


def stop_hanging(run: RunFolder, recorder: RunRecorder) -> None:
    """The process is about to be ended at its ceiling, by a thread: the run becomes what its newest checkpoint has.

    What hangs may be the run's folder, and a thread that writes there keeps the record's lock: neither is waited for.
    """
    recorded = threading.Event()

    def end() -> None:
        try:
            recorder.close("budget_stop")
            recorded.set()
            if recorder.newest:
                adapter_from(run, recorder.newest)
                recorder.close("budget_stop", adapter_step=int(read_manifest(recorder.newest)["step"]))
        except Exception as error:  # whatever it is, the process ends
            what = run.adapter if recorded.is_set() else run.run_json
            say(f"{what}: not written ({first_line(error)}); `finetune train --resume {run.path}` does it")
            recorded.set()

    _within(HARD_STOP_SECONDS, end)
    if not recorded.is_set():
        say(f"{run.run_json}: not written, its folder does not answer; `finetune train --resume {run.path}` does it")


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do something, and do not wait for it any longer than that."""
    thread = threading.Thread(target=action, name="ending", daemon=True)
    thread.start()
    thread.join(seconds)


def _remove_not_started(session: Session) -> bool:
    """A new run for which nothing was loaded yet leaves no folder behind; returns whether this is one."""
    not_started = session.record.attempts == 1 and session.record.hardware is None
    if not_started and distributed.is_rank0():
        shutil.rmtree(session.run.path, ignore_errors=True)
        with suppress(OSError):
            session.run.path.parent.rmdir()  # unless there is something else in it
    return not_started


def foreseeable(error: BaseException, folder: Path) -> UserError | None:
    """The message for a full disk, which safetensors and torch report by other errors than OSError, and a full GPU."""
    if isinstance(error, OSError):
        return disk_error(error, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "out of GPU memory, not in a step's passes, which begin again in smaller pieces, but in validation or beside them: "
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
            "interrupted": f"{run.path}: interrupted, a checkpoint is saved; go on with `finetune train --resume {run.path}`",
        }[status]
    )
