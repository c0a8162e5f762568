"""What all requests to the endpoint share: the model, the queue, the key, and whether it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from finetune.serve.answering import Answering
from finetune.serve.load import Queue

State = Literal["loading", "ready", "failed", "stopping"]


@dataclass
class Service:
    """What the handlers share. key: that clients have to show; None: none, and then only requests to a loopback name are
    answered. log: writes one line. fault: why `state` is failed."""

    answering: Answering
    queue: Queue
    key: str | None
    log: Callable[[str], None]
    state: State = "loading"
    fault: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.answering.target.name
