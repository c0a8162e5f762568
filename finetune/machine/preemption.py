"""Watches for preemption of this machine: polls Google's metadata server and reports each notice once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from finetune.machine import metadata
from finetune.machine.price import provisioned

PREEMPTED, MAINTENANCE = "preempted", "maintenance-event"
ALARMS = {PREEMPTED: "TRUE", MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}
"""The values of instance/KEY that announce the end of this machine. After a preemption notice it has up to 30 s; before host
maintenance a machine with a GPU has an hour, and only if the key was queried before."""
HOLD_SECONDS = 10
"""How long the metadata server delays its response if nothing changes. A connection that died silently is noticed only after
that, so it is short compared to the 30 s of a preemption."""
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.1, 2.0
"""Backoff between two requests to a server that is busy or gone."""
REST_SECONDS = 0.5
"""Pause after a successful request, for servers that do not delay their response."""


class PreemptionWatch:
    """Calls a hook when Google announces the end of this machine. Outside of Google Cloud its threads end at once.

    on_notice: called from a thread, once for each key of ALARMS, with that key; it should only set a flag. Use as a context
    manager, or call `start` and `close`.
    """

    def __init__(self, on_notice: Callable[[str], None]) -> None:
        self._on_notice = on_notice
        self._closed = threading.Event()
        self._on_cloud = provisioned()
        self._clients = {key: metadata.Client() for key in ALARMS}
        self._threads = [
            threading.Thread(target=self._listen, args=(key,), name=f"metadata {key}", daemon=True) for key in ALARMS
        ]

    def start(self) -> PreemptionWatch:
        for thread in self._threads:
            thread.start()
        return self

    def listening(self) -> bool:
        """Whether a notice would still be received."""
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Ends the threads, also during a request."""
        self._closed.set()
        for client in self._clients.values():
            client.cancel()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(metadata.CONNECT_SECONDS + 1)

    def __enter__(self) -> PreemptionWatch:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, key: str) -> None:
        client, etag, pause = self._clients[key], "", FIRST_PAUSE_SECONDS
        answers = 0
        while not self._closed.is_set():
            answer = client.ask(key, last_etag=etag, wait_seconds=HOLD_SECONDS if etag else 0)
            answers += 1
            if answer.value.upper() == ALARMS[key]:
                self._on_notice(key)
                return
            elsewhere = answer == metadata.NO_RESPONSE and answers == 1 and not self._on_cloud
            if elsewhere or 400 <= answer.status < 500:  # the latter: a key that this server does not know
                return
            if answer.status == metadata.OK:
                etag, pause = answer.etag, FIRST_PAUSE_SECONDS
                self._closed.wait(REST_SECONDS)
            else:
                self._closed.wait(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
