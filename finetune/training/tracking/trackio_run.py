"""One Trackio run for all attempts of a run: in Trackio's local store, on its server, or in a Space."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finetune.runtime.files import write_text
from finetune.runtime.network import require_answer

NAME_FILE = "trackio-run"
SERVER_TIMEOUT_SECONDS = 20.0


class TrackioRun:
    """Trackio finds a run by its name, so the name holds the run's id and is kept in its folder. Steps that it has already keep
    the values of the attempt that logged them first. It sends in a thread of its own, and warns of errors."""

    def __init__(self, opening: dict[str, Any]) -> None:
        """opening: folder, run_name (unique), project, config (nested; each attempt replaces it), writes (false: only results are
        added)."""
        _check_server()
        import trackio

        write_text(Path(opening["folder"]) / NAME_FILE, f"{opening['run_name']}\n")
        self._run: Any = trackio.init(
            project=opening["project"], name=opening["run_name"], config=opening["config"] or None, resume="allow",
            auto_log_gpu=False, auto_log_cpu=False, embed=False,
        )  # fmt: skip
        self._last: int = self._run._next_step - 1  # of all attempts; -1: none
        self._writes = bool(opening["writes"])

    def deliver(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "values" in message and self._writes and message["step"] > self._last:
                self._run.log(message["values"], step=message["step"])
            elif "results" in message and not self._has(message["results"]):
                self._run.log(message["results"], step=message["step"])

    def _has(self, results: dict[str, float]) -> bool:
        """Whether the local store has them; elsewhere a report that is written again adds one more point of the same value."""
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._run.project, self._run.name, run_id=self._run.id)
        return any(results.items() <= row.items() for row in rows)

    def close(self) -> None:
        self._run.finish()


def _check_server() -> None:
    """Raises OSError if the server does not respond: Trackio would go on as if it had no earlier steps. An HTTP error counts as a
    response."""
    address = os.environ.get("TRACKIO_SERVER_URL", "").strip()
    if address and not os.environ.get("TRACKIO_SPACE_ID", "").strip():
        require_answer(address.partition("?")[0], SERVER_TIMEOUT_SECONDS)
