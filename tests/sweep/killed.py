"""A sweep in one process that kills itself: `python -m tests.sweep.killed EVENT CONFIG WORD...`.

It trains in the process itself, which saves the imports of each trial. Events are the begin and the end of every write in the
sweep's folder, and every training step; at the one of that number the process gets a SIGKILL. 0: never.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from finetune.cli.main import main
from finetune.runtime import files
from finetune.sweep.open import Wanted, machine_of, open_sweep
from finetune.sweep.programs import Ended
from finetune.sweep.run import Outcome, work_on
from finetune.sweep.turn import START_SECONDS, Work
from finetune.sweep.workers import Worker


def train_here(name: str, words: Sequence[str]) -> Ended:
    return Ended(main(["train", *words]))


def sweep(
    config: Path,
    words: Sequence[str],
    train: Callable[[str, Sequence[str]], Ended] = train_here,
    usd: float | None = None,
    workers: int = 1,
    start_seconds: float = START_SECONDS,
    **wanted: Any,
) -> tuple[Path, Outcome]:
    """What `finetune sweep` does, without its report. Returns the sweep's folder, and why it ended."""
    opened = open_sweep(Wanted(config, list(words), **wanted))
    machine = replace(machine_of(opened.base, usd), start_seconds=start_seconds)
    opened.create()
    with Worker(opened.folder.path) as worker:
        work = Work(opened.sweep, opened.folder, worker, machine, usd, workers, opened.settings_of, print)
        return opened.folder.path, work_on(work, train)


def kill_at(event: int) -> None:
    """From now on, count events and kill this process at the one of that number."""
    count = 0

    def happens() -> None:
        nonlocal count
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

    original = files.atomic_file

    @contextmanager
    def atomic_file(path: Path) -> Iterator[IO[str]]:
        ours = "sweeps" in path.parts
        with original(path) as file:
            if ours:
                happens()
            yield file
        if ours:
            happens()

    files.atomic_file = atomic_file
    from finetune.training.callbacks import Throughput

    begun = Throughput.on_step_begin

    def on_step_begin(self: Throughput, *arguments: Any, **others: Any) -> None:
        happens()
        begun(self, *arguments, **others)

    Throughput.on_step_begin = on_step_begin  # type: ignore[method-assign]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if int(sys.argv[1]):
        kill_at(int(sys.argv[1]))
    _, outcome = sweep(Path(sys.argv[2]), sys.argv[3:])
    print(outcome)
    sys.exit(outcome.code)
