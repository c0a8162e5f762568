"""The processes of one run. torchrun starts one per GPU; rank 0 prints and writes files for all of them.

A rank that fails publishes its fault in torchrun's key-value store, which the others watch: none waits forever, and rank 0
reports the fault once. Without torchrun there is one rank, and everything here is a no-op that does not import torch.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from finetune.errors import EXIT_MISSING, EXIT_TRANSIENT, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

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
    """What the thread that watches the store shares with the main thread."""

    store: Any
    stopped: threading.Event = field(default_factory=threading.Event)
    ending: threading.Event = field(default_factory=threading.Event)
    clean_up: Callable[[], None] = lambda: None
    thread: threading.Thread | None = None


_watch: _Watch | None = None


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together, as set by torchrun and `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has reached this point. (NCCL's own barrier would also wait for the GPU.)"""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank. Takes a few tenths of a millisecond on one host, because it runs on the CPU."""
    return any_of_each([flag])[0]


def any_of_each(flags: Sequence[bool]) -> list[bool]:
    """`any_of` for each of several flags at once."""
    if world_size() == 1:
        return list(flags)
    import torch

    shared = torch.tensor([int(flag) for flag in flags])
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in shared]


def gather_on_rank0(value: Value) -> list[Value] | None:
    """On rank 0 the values of all ranks, in rank order; None on the others. The values must be picklable."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] | None = [None] * world_size() if is_rank0() else None
    torch.distributed.gather_object(value, values, dst=0)
    return values


def run_on_rank0(make: Callable[[], Value]) -> Value:
    """The result of `make`, which only rank 0 calls, on every rank. The result must be picklable."""
    if world_size() == 1:
        return make()
    import torch

    box: list[Any] = [make() if is_rank0() else None]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value: Value = box[0]
    return value


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with rank 0's."""
    if world_size() > 1:
        import torch

        torch.distributed.broadcast(tensor, src=0)


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def seed_per_rank(seed: int) -> None:
    """Give each rank its own dropout masks. Rank 0 keeps the random state that it would have alone."""
    if not is_rank0():
        import torch

        torch.manual_seed(seed + rank())


def on_failure(clean_up: Callable[[], None]) -> None:
    """Sets what rank 0 does before it exits because another rank has failed while it waits for it; called from a thread."""
    if _watch:
        _watch.clean_up = clean_up


@contextmanager
def process_group() -> Iterator[None]:
    """Wraps everything that the ranks do together; they leave it together, or after one of them has failed.

    Raises UserError on rank 0 for the fault of any rank. The other ranks exit silently, with the exit code of that fault.
    """
    global _watch
    if world_size() == 1 or _watch:  # alone, or inside another `process_group`
        yield
        return
    try:
        _connect()
        yield
        barrier()
    except BaseException as error:
        _end_of_failed(error)
        raise
    finally:
        if _watch:
            _watch.stopped.set()
            if _watch.thread:
                _watch.thread.join()
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
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    _watch = _Watch(PrefixStore(os.environ.get("TORCHELASTIC_RUN_ID", "run"), store))
    _watch.thread = threading.Thread(target=_watch_store, args=(_watch,), daemon=True)
    _watch.thread.start()


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
    mine: dict[str, Any] = {"rank": rank(), "message": _message(error), "code": _exit_code(error)}
    if isinstance(error, UserError):
        mine["user_code"] = error.code
    with suppress(RuntimeError):  # the store ended with the process that hosts it
        mine = json.loads(watch.store.compare_set(FAILED, "", json.dumps(mine)))
    return mine


def end_all(message: str, code: int) -> None:
    """Make the other ranks, which may wait for this one forever, exit with this code; the caller ends this rank itself."""
    if _watch:
        with suppress(RuntimeError):
            _watch.store.compare_set(FAILED, "", json.dumps({"rank": rank(), "message": message, "code": code}))


def _end_of_failed(error: BaseException) -> None:
    """Returns if this rank is to raise its own error; otherwise raises what it has to raise instead."""
    watch = _watch
    if watch is None:  # not connected yet: if rank 0 fails in the same way, it has this long to report it
        if not is_rank0():
            time.sleep(REPORTED_SECONDS)
        return
    watch.ending.set()
    known = _publish(watch, error)
    atexit.register(_exit_at_once, known["code"])
    if is_rank0():
        with suppress(RuntimeError):
            watch.store.set(REPORTED, "1")
        if known["rank"] != 0 and known["message"] != _message(error):
            _raise_for(known, error)
    elif known["rank"] != rank() or (isinstance(error, UserError | KeyboardInterrupt) and _reported(watch)):
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


def _watch_store(watch: _Watch) -> None:
    """The watching thread. The main thread may hang in a collective operation that only the end of the process interrupts."""
    while not watch.stopped.wait(POLL_SECONDS):
        try:
            if not watch.store.check([FAILED]):
                continue
            known = json.loads(watch.store.get(FAILED))
        except RuntimeError:
            known = {"rank": 0, "message": "the other machines are no longer there", "code": EXIT_TRANSIENT}
        if watch.ending.wait(GRACE_SECONDS) or watch.stopped.is_set():
            return
        if is_rank0():
            watch.clean_up()
            message = " ".join(known["message"].split())
            from tqdm import tqdm

            tqdm.write(
                f"finetune: process {known['rank']}: {message}", file=sys.stderr
            )  # not on the line of a progress bar
            with suppress(RuntimeError):
                watch.store.set(REPORTED, "1")
        else:
            time.sleep(GRACE_SECONDS)
        os._exit(known["code"])
