"""One process that judges answers (judge_worker.py), as its parent sees it: start, a batch and its replies, end.

Whatever the process does, or fails to do, neither blocks the parent for good nor ends it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer

START = (
    "import os, sys, json; os.nice(int(sys.argv[2])); sys.path[:] = json.loads(sys.argv[1]); "
    "from finetune.evaluation.judge_worker import main; main()"
)
"""With the parent's own search path, so that it loads the same code."""
START_SECONDS = 60.0
END_SECONDS = 5.0
READ_BYTES = 1 << 16


class Asked(NamedTuple):
    """A question that answers are judged for."""

    record: Record
    database: Path


class Ended(Exception):
    """The process ended, or stalled and was killed. The message says how."""


class JudgeProcess:
    """A running process. It ends with the thread that started it, at the latest."""

    def __init__(self, settings: dict[str, Any], folder: str, nice: int, stalled_seconds: float) -> None:
        """settings: see judge_worker.py. folder: for temporary files. Raises OSError if it does not start."""
        self._stalled = stalled_seconds
        self._sent: set[int] = set()
        self._schemas: dict[str, str] = {}
        self._received = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, json.dumps(sys.path), str(nice)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TMPDIR": folder},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout.fileno()
        with suppress(BrokenPipeError):  # `wait_until_ready` finds that it has ended
            self._requests.write(json.dumps(settings).encode() + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises Ended if it does not get ready."""
        self._reply(START_SECONDS)

    def ask(self, answers: Sequence[tuple[int, Answer]], asked: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        """The reply to each answer, in order, as soon as it is there. answers: with the numbers of their questions. Raises
        Ended."""
        try:
            self._requests.write(self._message(answers, asked))
        except OSError:
            raise self._end("before it began") from None
        for _ in answers:
            yield self._reply(self._stalled)

    def _message(self, answers: Sequence[tuple[int, Answer]], asked: Sequence[Asked]) -> bytes:
        """Read whole by the process before it replies, so that neither waits for the other. Records and schemas are sent once."""
        schemas: dict[str, str] = {}
        records: dict[int, tuple[str, str, str, str]] = {}
        for number in {number for number, _ in answers} - self._sent:
            record, database = asked[number]
            schema = self._schemas.get(record.schema)
            if schema is None:
                schema = self._schemas[record.schema] = str(len(self._schemas))
                schemas[schema] = record.schema
            records[number] = record.sql, record.dialect, schema, str(database)
        self._sent.update(records)
        given = [(number, answer.text, answer.problem) for number, answer in answers]
        return json.dumps({"schemas": schemas, "records": records, "answers": given}).encode() + b"\n"

    def _reply(self, seconds: float) -> dict[str, Any]:
        ready = select.poll()
        ready.register(self._replies, select.POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self.kill()
                raise Ended(f"no verdict within {seconds:g} seconds")
            chunk = os.read(self._replies, READ_BYTES)
            if not chunk:
                raise self._end("it ended")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._end("its reply is damaged") from None
        return reply

    def _end(self, how: str) -> Ended:
        """What is known about its end, after making sure of it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        status = self._process.returncode
        self.kill()
        if status is None or status == 0:
            return Ended(how)
        return Ended(
            f"killed by signal {-status}, perhaps for want of memory" if status < 0 else f"exit status {status}"
        )

    def finish(self) -> None:
        """Let it end by itself, which removes its temporary files."""
        with suppress(OSError):
            self._requests.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it, whatever state it is in."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
