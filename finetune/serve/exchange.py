"""One question to the endpoint and its answer, whole or as a stream, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from finetune.serve.answering import Prepared, Result
from finetune.serve.api_errors import ApiError
from finetune.serve.disconnect import unless_gone
from finetune.serve.questions import MAX_BODY_BYTES, Question, read_question
from finetune.serve.service import Service

BODY_SECONDS = 30.0
DISCARDED_BYTES = 8 * MAX_BODY_BYTES
"""Of a body that is too large this much is read, since most clients read no answer before they have sent everything."""
CLOSED_REQUEST = 499
"""In the log: the client was gone before its answer."""


class Exchange:
    """One question and its answer."""

    def __init__(self, service: Service, request: Request, chat: bool) -> None:
        self._service, self._request, self._chat = service, request, chat
        self._began = time.monotonic()
        self._id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._asked: Prepared | None = None

    async def run(self) -> Response:
        queue = self._service.queue
        queue.enter()
        handed_over = False
        try:
            question = read_question(await _body(self._request), chat=self._chat, models=(self._service.model,))
            self._asked = await self._service.answering.prepare(question)
            if question.stream:
                response = await unless_gone(self._request, self._begin_stream(question, self._asked))
                handed_over = True
                return response
            result = await unless_gone(self._request, self._whole(self._asked))
            self.log(200, "", result)
            return JSONResponse(self._response(result))
        finally:
            if not handed_over:
                queue.leave()

    def log(self, status: int, told: str, result: Result | None = None) -> None:
        """One line, without any text of the question or the answer."""
        seconds = time.monotonic() - self._began
        parts = [f"POST {self._request.url.path} {status} {seconds:.2f} s"]
        if self._asked is not None:
            parts.append(self._asked.database_name or "schema of the client")
        if result is not None:
            parts.append(f"{result.answer.prompt_tokens} + {result.answer.new_tokens} tokens")
            if result.rows is not None:
                parts.append(f"{len(result.rows['rows'])} rows" if "rows" in result.rows else "SQL failed")
        self._service.log(", ".join(part for part in (*parts, told) if part))

    async def _whole(self, asked: Prepared) -> Result:
        async with (
            self._service.queue.turn(),
            aclosing(self._service.answering.steps(asked, partial=False)) as steps,
        ):
            async for step in steps:
                if isinstance(step, Result):
                    return step
        raise AssertionError("steps end with a result")

    # One response -------------------------------------------------------------------------------------------

    def _response(self, result: Result) -> dict[str, Any]:
        more = {} if result.rows is None else {"finetune": result.rows}
        choice: dict[str, Any] = {"index": 0, "finish_reason": _reason(result), "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": result.sql, "refusal": None, **more}
        else:
            choice |= {"text": result.sql, **more}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": _usage(result)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": int(time.time()), "model": self._service.model}

    # A stream -----------------------------------------------------------------------------------------------

    async def _begin_stream(self, question: Question, asked: Prepared) -> Response:
        """Waits for the first part of the answer, so that a question without one gets a proper status."""
        turn = self._service.queue.turn()
        await turn.__aenter__()
        steps = self._service.answering.steps(asked, partial=True)

        async def close() -> None:
            await steps.aclose()
            await turn.__aexit__(None, None, None)

        try:
            first = await anext(steps)
        except BaseException:
            await close()
            raise

        async def end() -> None:
            await close()
            self._service.queue.leave()

        return _Events(self._events(first, steps, question.usage), end)

    async def _events(
        self, first: str | Result, steps: AsyncGenerator[str | Result, None], usage: bool
    ) -> AsyncGenerator[str, None]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        result: Result | None = None
        try:
            if self._chat:
                yield _event(self._chunk(kind, {"role": "assistant", "content": ""}, None))
            step: str | Result = first
            while not isinstance(step, Result):
                yield _event(self._chunk(kind, {"content": step}, None))
                step = await anext(steps)
            result = step
            more = {} if result.rows is None else {"finetune": result.rows}
            yield _event(self._chunk(kind, more, _reason(result)))
            if usage:
                yield _event(self._head(kind) | {"choices": [], "usage": _usage(result)})
            yield "data: [DONE]\n\n"
            self.log(200, "streamed", result)
        except ApiError as error:
            self.log(200, f"stream ended with {error.code}")
            yield _event(error.body())
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.log(CLOSED_REQUEST, "client is gone")
            raise

    def _chunk(self, kind: str, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._chat:
            choice["delta"] = delta
        else:
            choice |= {"text": delta.get("content", "")} | {k: v for k, v in delta.items() if k == "finetune"}
        return self._head(kind) | {"choices": [choice]}


class _Events(StreamingResponse):
    """Server-sent events. end: called at the end, however it comes, also if nothing was sent."""

    def __init__(self, content: AsyncGenerator[str, None], end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._content, self._end = content, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._content.aclose()
            await self._end()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _reason(result: Result) -> str:
    return "length" if result.cut else "stop"


def _usage(result: Result) -> dict[str, int]:
    prompt, new = result.answer.prompt_tokens or 0, result.answer.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _body(request: Request) -> bytes:
    """Raises ApiError for a body that is too large, comes too slowly, or does not say that it is JSON, which no web page can say
    without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "expected Content-Type: application/json", code="invalid_content_type")
    too_large = ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > DISCARDED_BYTES:
        raise too_large
    body, received = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                received += len(part)
                if received <= MAX_BODY_BYTES:
                    body += part
                elif received > DISCARDED_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds", code="timeout") from None
    if received > MAX_BODY_BYTES:
        raise too_large
    return bytes(body)
