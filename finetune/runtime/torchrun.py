"""`python -m finetune.runtime.torchrun`: torchrun, with exit codes that a managed job can go by.

It takes torchrun's arguments. torchrun itself exits with 1 however a run ended, and gives it 30 seconds to save its work when it
is told to stop. Here the code is that of `finetune train` (2 the user's mistake, 75 interrupted), and the time GRACE_SECONDS.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from finetune.errors import EXIT_OK, EXIT_TRANSIENT, EXIT_USER_ERROR

GRACE_SECONDS = 180
"""For a checkpoint to be saved where the environment does not say; the default of finetune/job/settings.py, too."""
SHARE = 0.9
"""Of that time, so that the processes are gone before whoever waits for us gives up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them; returns the exit code of the run."""
    logging.disable(logging.CRITICAL)  # the processes have told what there is to tell
    grace = int(SHARE * float(os.environ.get("GRACE_SECONDS") or GRACE_SECONDS))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a page of warning
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        return exit_code(failure.exitcode for _, failure in sorted(failed.failures.items()))
    except SignalException:
        return EXIT_TRANSIENT
    return EXIT_OK


def exit_code(codes: Iterable[int]) -> int:
    """The code of a run from those of its failed processes, of which torchrun ends by signal (-15) all but the first."""
    all_codes = list(codes)
    found = [code for code in all_codes if code > 0]
    for code in (EXIT_USER_ERROR, EXIT_TRANSIENT):
        if code in found:
            return code
    return found[0] if found else 128 - all_codes[0]  # as a shell tells of a signal


if __name__ == "__main__":
    sys.exit(main())
