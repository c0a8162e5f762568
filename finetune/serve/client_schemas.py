"""Prompts with a schema that a client gives. Reading DDL can take minutes for text that is made to be slow, so a process of its
own does it (schema_worker.py), which is ended when it takes too long."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from finetune.data.prompts import PromptTemplate
from finetune.serve.api_errors import invalid
from finetune.serve.process import worker_environment

SECONDS = 5.0
"""For one schema; a large one takes a hundredth of a second."""
START_SECONDS = 60.0
WORKERS = 2
LONGEST_REPLY = 8 << 20


class ClientSchemas:
    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        self._idle: list[asyncio.subprocess.Process] = []
        self._turn = asyncio.Semaphore(WORKERS)

    async def prompt(self, schema: str, question: str, dialect: str, evidence: str | None) -> str:
        """Raises ApiError for a schema that cannot be read, or not in time."""
        request = {
            "schema": schema,
            "question": question,
            "dialect": dialect,
            "evidence": evidence,
            "schema_format": self._template.schema_format,
            "version": self._template.version,
        }
        async with self._turn:
            reply = await self._asked(request)
        if "prompt" in reply:
            return str(reply["prompt"])
        raise invalid(str(reply["error"]), param="schema", code="unreadable_schema")

    async def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        worker = self._idle.pop() if self._idle else await _started()
        assert worker.stdin is not None and worker.stdout is not None
        whole = False
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            line = await asyncio.wait_for(worker.stdout.readline(), SECONDS)
            reply: dict[str, Any] = json.loads(line)
            whole = True
        except TimeoutError:
            return {"error": f"the schema is not read within {SECONDS:.0f} seconds; give a smaller one"}
        except (OSError, ValueError):  # it has ended: memory, or a fault of SQLite or sqlglot
            return {"error": "the schema cannot be read"}
        finally:
            if whole and worker.returncode is None:
                self._idle.append(worker)
            else:
                await _end(worker)
        return reply

    async def close(self) -> None:
        while self._idle:
            await _end(self._idle.pop())


async def _started() -> asyncio.subprocess.Process:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "finetune.serve.schema_worker",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env=worker_environment(), start_new_session=True, limit=LONGEST_REPLY,
    )  # fmt: skip
    assert worker.stdout is not None
    with suppress(TimeoutError):
        await asyncio.wait_for(worker.stdout.readline(), START_SECONDS)
    return worker


async def _end(worker: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
