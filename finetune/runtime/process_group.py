"""Connects the ranks of a run, and ends all of them when one fails.

A rank that fails publishes its fault in torchrun's key-value store, which the others watch: none waits forever, and rank 0
reports the fault once. A rank that is suddenly gone cannot publish anything: presence.py notices.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

from finetune.errors import EXIT_MISSING, EXIT_TRANSIENT, EXIT_USER_ERROR, TransientError, UserError
from finetune.runtime import distributed
from finetune.runtime.network import interface_towards
from finetune.runtime.presence import LOST_SECONDS, SURE_SECONDS, Presence, lost_seconds

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others: rank 0 may be copying a checkpoint into a slow bucket."""
POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Time for the main thread to end by itself, before the watching thread ends the process."""
REPORTED_SECONDS = 20.0
"""Time for rank 0 to report the fault of another rank; after that, the other rank reports it itself."""
FAILED, REPORTED = "finetune/failed", "finetune/reported"


@dataclass
class _Watch:
    """What the threads that watch the store, and its answers, share with the main thread.

    presence: None with a single machine. lost_seconds: after which silence is the end. answered: when the store last did
    (time.monotonic()).
    """

    store: Any
    presence: Presence | None = None
    lost_seconds: float = LOST_SECONDS
    answered: float = field(default_factory=time.monotonic)
    stopped: threading.Event = field(default_factory=threading.Event)
    ending: threading.Event = field(default_factory=threading.Event)
    clean_up: Callable[[int], None] = lambda code: None
    threads: list[threading.Thread] = field(default_factory=list)
    parent: int = field(default_factory=os.getppid)


_watch: _Watch | None = None


def on_failure(clean_up: Callable[[int], None]) -> None:
    """Sets what rank 0 does before it exits because another rank has failed while it waits for it; called from a thread, with the
    exit code."""
    if _watch:
        _watch.clean_up = clean_up


@contextmanager
def process_group() -> Iterator[None]:
    """Wraps everything that the ranks do together; they leave it together, or after one of them has failed.

    Raises UserError on rank 0 for the fault of any rank. The other ranks exit silently, with the exit code of that fault.
    """
    global _watch
    if distributed.world_size() == 1 or _watch:  # alone, or inside another `process_group`
        yield
        return
    try:
        _connect()
        yield
        distributed.barrier()
    except BaseException as error:
        _end_of_failed(error)
        raise
    finally:
        if _watch:
            _watch.stopped.set()
            for thread in _watch.threads:
                thread.join(GRACE_SECONDS)  # it may wait for a store that is gone
        _watch = None
    _disconnect()


def _connect() -> None:
    import torch
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    global _watch
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: process {local} of this machine finds {torch.cuda.device_count()} GPUs; start as "
                "many processes as there are GPUs",
                code="distributed.too_many_processes",
            )
        torch.cuda.set_device(local)
    else:  # accelerate would use "cpu:0", another device to torch, to which it copies the model and cannot load a checkpoint
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    several = distributed.machines() > 1
    if several and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
    seconds = lost_seconds()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    shared = PrefixStore(os.environ.get("TORCHELASTIC_RUN_ID", "run"), store)
    presence = None
    if several:
        others = list(range(1, distributed.world_size())) if distributed.is_rank0() else []
        presence = Presence(shared, distributed.rank(), others, time.monotonic)
    _watch = _Watch(shared, presence, seconds)
    for target in (_watch_store, _watch_answers):
        _watch.threads.append(threading.Thread(target=target, args=(_watch,), daemon=True))
        _watch.threads[-1].start()


def _disconnect() -> None:
    import torch

    torch.distributed.destroy_process_group()


# --- a rank fails


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    return EXIT_TRANSIENT if isinstance(error, KeyboardInterrupt) else EXIT_MISSING


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _publish(watch: _Watch, error: BaseException) -> dict[str, Any]:
    """Put the fault into the store, unless another rank was first; returns the first fault: rank, message, code (the exit code),
    and for a UserError user_code (the error's code)."""
    mine: dict[str, Any] = {"rank": distributed.rank(), "message": _message(error), "code": _exit_code(error)}
    if isinstance(error, UserError):
        mine["user_code"] = error.code
    with suppress(RuntimeError):  # the store ended with the process that hosts it
        mine = json.loads(watch.store.compare_set(FAILED, "", json.dumps(mine)))
    return mine


def end_all(message: str, code: int) -> None:
    """Make the other ranks, which may wait for this one forever, exit with this code; the caller ends this rank itself."""
    if _watch:
        with suppress(RuntimeError):
            _watch.store.compare_set(
                FAILED, "", json.dumps({"rank": distributed.rank(), "message": message, "code": code})
            )


def _end_of_failed(error: BaseException) -> None:
    """Returns if this rank is to raise its own error; otherwise raises what it has to raise instead."""
    watch = _watch
    if watch is None:  # not connected yet: if rank 0 fails in the same way, it has this long to report it
        if not distributed.is_rank0():
            time.sleep(REPORTED_SECONDS)
        return
    watch.ending.set()
    known = _publish(watch, error)
    atexit.register(_exit_at_once, known["code"])
    if distributed.is_rank0():
        with suppress(RuntimeError):
            watch.store.set(REPORTED, "1")
        if known["rank"] != 0 and known["message"] != _message(error):
            _raise_for(known, error)
    elif known["rank"] != distributed.rank() or (isinstance(error, UserError | KeyboardInterrupt) and _reported(watch)):
        time.sleep(GRACE_SECONDS)  # torchrun ends all ranks once one has ended: let that be rank 0, which reports
        raise SystemExit(known["code"]) from None


def _exit_at_once(code: int) -> None:
    """Exit without the interpreter's shutdown, which would wait for the other ranks, or abort with another code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _raise_for(known: dict[str, Any], error: BaseException) -> NoReturn:
    if known["code"] == EXIT_USER_ERROR:
        raise UserError(f"process {known['rank']}: {known['message']}", code=known["user_code"]) from error
    print(f"finetune: process {known['rank']}: {known['message']}", file=sys.stderr)
    raise SystemExit(known["code"]) from None


def _reported(watch: _Watch) -> bool:
    deadline = time.monotonic() + REPORTED_SECONDS
    try:
        while time.monotonic() < deadline:
            if watch.store.check([REPORTED]):
                return True
            time.sleep(POLL_SECONDS)
    except RuntimeError:  # rank 0 hosts the store and has ended
        return True
    return False


def machine_lost(error: BaseException) -> TransientError | None:
    """Why an operation with the other ranks has failed, if that is because one of them is gone; waits for its silence,
    up to twice SURE_SECONDS. None for any other error, and where a rank has said what is wrong with it."""
    watch = _watch
    if watch is None or watch.presence is None or not isinstance(error, RuntimeError):
        return None
    watch.ending.set()  # this thread ends the process, not the watching one
    began = time.monotonic()
    while time.monotonic() - began < 2 * SURE_SECONDS:  # the last sign of life may be seen a few seconds after the end
        try:
            if watch.store.check([FAILED]):
                return None
            if (rank := watch.presence.silent(SURE_SECONDS)) is not None:
                return _lost(rank)
        except RuntimeError:
            return _lost(0)
        time.sleep(POLL_SECONDS)
    return None


def _lost(rank: int) -> TransientError:
    what = "the machine of process 0" if rank == 0 else f"process {rank}, or its machine,"
    return TransientError(
        f"{what} is no longer there; the run goes on from its newest checkpoint when it is started again on all machines",
        code="distributed.machine_lost",
    )


def _known_fault(watch: _Watch) -> dict[str, Any] | None:
    """The first fault of any rank, as `_publish` has it; None while there is none."""
    try:
        if os.getppid() != watch.parent:
            _publish(watch, TransientError("torchrun was killed", code="distributed.machine_lost"))
        if watch.presence is not None:
            watch.presence.beat()
            if (rank := watch.presence.silent(watch.lost_seconds)) is not None:
                _publish(watch, _lost(rank))
        failed = watch.store.check([FAILED])
        watch.answered = time.monotonic()
        return json.loads(watch.store.get(FAILED)) if failed else None
    except RuntimeError:
        return {"rank": 0, "message": "the other machines are no longer there", "code": EXIT_TRANSIENT}


def _watch_store(watch: _Watch) -> None:
    """The watching thread. The main thread may hang in a collective operation that only the end of the process interrupts."""
    while not watch.stopped.wait(POLL_SECONDS):
        known = _known_fault(watch)
        if known is None:
            continue
        if watch.ending.wait(GRACE_SECONDS) or watch.stopped.is_set():
            return
        if distributed.is_rank0():
            watch.clean_up(known["code"])
            message = " ".join(known["message"].split())
            from tqdm import tqdm

            of = f"process {known['rank']}: " if known["rank"] else ""
            tqdm.write(f"finetune: {of}{message}", file=sys.stderr)  # not on the line of a progress bar
            with suppress(RuntimeError):
                watch.store.set(REPORTED, "1")
        else:
            time.sleep(GRACE_SECONDS)
        os._exit(known["code"])


def _watch_answers(watch: _Watch) -> None:
    """Ends a process whose store does not answer: a machine that has vanished does not even break its connections."""
    while watch.presence is not None and not watch.stopped.wait(POLL_SECONDS):
        if time.monotonic() - watch.answered > watch.lost_seconds:
            print(f"finetune: {_lost(0)}", file=sys.stderr, flush=True)
            os._exit(EXIT_TRANSIENT)
