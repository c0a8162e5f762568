"""A line now and then, so that a long wait does not look like a program that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune.runtime.console import say
from finetune.runtime.quantities import duration

EVERY_SECONDS = 15.0


@contextmanager
def sign_of_life(what: str, *, every: float = EVERY_SECONDS, say: Callable[[str], None] = say) -> Iterator[None]:
    """Says every so many seconds on stderr what is still being done, and for how long; nothing about what is done before that."""
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(every):
            say(f"{what}, for {duration(time.monotonic() - began)} so far")

    thread = threading.Thread(target=tell, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
