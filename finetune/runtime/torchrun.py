"""`python -m finetune.runtime.torchrun`: torchrun, with exit codes that a managed job can use.

It takes torchrun's arguments. torchrun itself exits with 1 however a run failed, and on a signal gives it 30 seconds to save.
Here the exit code is that of `finetune train` (2 a user error, 75 interrupted), and the time is GRACE_SECONDS.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed import DistError  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.utils import store as agents
from torch.distributed.run import parse_args, run

from finetune.errors import EXIT_OK, EXIT_TRANSIENT, EXIT_USER_ERROR, LONGEST_MESSAGE

GRACE_SECONDS = 180
"""Time to save a checkpoint if the environment does not set GRACE_SECONDS; also the default of finetune/job/settings.py."""
SHARE = 0.9
"""Share of that time for the processes, so that they have ended before whoever waits for us gives up."""
LEAVE_SECONDS = 10
"""How long the machine that keeps the store waits for the others to have read that all are done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; returns the exit code of the run."""
    logging.disable(logging.CRITICAL)  # the processes have reported their errors themselves
    grace = int(SHARE * float(os.environ.get("GRACE_SECONDS") or GRACE_SECONDS))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a page of warning
    asked = parse_args(arguments)  # type: ignore[no-untyped-call]
    leave_last(keeps_store=asked.node_rank == 0)
    try:
        run(asked)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        return exit_code(failure.exitcode for _, failure in sorted(failed.failures.items()))
    except SignalException:
        return EXIT_TRANSIENT
    except (DistError, RendezvousError, TimeoutError) as error:
        why = " ".join(str(error).split())[:LONGEST_MESSAGE]
        print(f"finetune: torchrun: the machines of this run did not find each other ({why}): every one has to start it, and to "
              "reach --master-addr at --master-port", file=sys.stderr)  # fmt: skip
        return EXIT_USER_ERROR
    return EXIT_OK


def leave_last(keeps_store: bool) -> None:
    """Have the first machine, which keeps the store of all, end after the others.

    torch's barrier at the end lets it go as soon as all have come; one that still reads prints a page about a broken connection.
    """
    meet = agents.barrier

    def meet_and_leave(*args: Any, **kwargs: Any) -> None:
        meet(*args, **kwargs)
        store, machines, key = kwargs["store"], kwargs["world_size"], kwargs["key_prefix"] + "/left"
        with suppress(DistError):
            if keeps_store:
                meet(store, machines, key, LEAVE_SECONDS)
            else:
                agents._barrier_nonblocking(store, machines, key)

    agents.barrier = meet_and_leave


def exit_code(codes: Iterable[int]) -> int:
    """The exit code of a run from those of its failed processes; torchrun kills all but the first by signal (-15)."""
    all_codes = list(codes)
    found = [code for code in all_codes if code > 0]
    for code in (EXIT_USER_ERROR, EXIT_TRANSIENT):
        if code in found:
            return code
    return found[0] if found else 128 - all_codes[0]  # a shell's code for a signal


if __name__ == "__main__":
    sys.exit(main())
