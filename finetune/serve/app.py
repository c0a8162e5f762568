"""The endpoint itself: GET /health and /v1/models, POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune.serve.answering import Answering, Prepared, Result
from finetune.serve.api_errors import ApiError
from finetune.serve.disconnect import unless_gone
from finetune.serve.load import Queue
from finetune.serve.questions import MAX_BODY_BYTES, Question, read_question

BODY_SECONDS = 30.0
DISCARDED_BYTES = 8 * MAX_BODY_BYTES
"""Of a body that is too large this much is read, since most clients read no answer before they have sent everything."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
State = Literal["loading", "ready", "failed", "stopping"]
CLOSED_REQUEST = 499
"""In the log: the client was gone before its answer."""


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


def application(service: Service) -> Starlette:
    handlers = _Handlers(service)
    return Starlette(
        routes=[
            Route("/health", handlers.health, methods=["GET"]),
            Route("/v1/models", handlers.models, methods=["GET"]),
            Route("/v1/models/{model}", handlers.one_model, methods=["GET"]),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/completions", handlers.completion, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _http_error,  # type: ignore[dict-item]
            ApiError: _api_error,  # type: ignore[dict-item]
            ClientDisconnect: _gone,  # type: ignore[dict-item]
            Exception: _fault,
        },
    )


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        service = self._service
        _check_host(request, service.key)
        told = {"status": service.state, "model": service.model, "backend": service.answering.backend.name}
        told |= {"error": service.fault} if service.fault else {}
        return JSONResponse(told, 200 if service.state == "ready" else 503)

    async def models(self, request: Request) -> Response:
        self._check(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._check(request)
        if request.path_params["model"] != self._service.model:
            raise ApiError(
                404, f"no such model; this server has {self._service.model}", code="model_not_found", param="model"
            )
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        return await self._logged(request, chat=True)

    async def completion(self, request: Request) -> Response:
        return await self._logged(request, chat=False)

    def _check(self, request: Request) -> None:
        """Raises ApiError unless the request shows the key."""
        key = self._service.key
        _check_host(request, key)
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(
                401, "no key, or a wrong one: give it as `Authorization: Bearer KEY`", code="invalid_api_key"
            )

    def _model(self) -> dict[str, Any]:
        answering = self._service.answering
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.created,
            "owned_by": "finetune",
            "finetune": {
                "databases": answering.databases.names,
                "dialects": list(answering.target.dialects),
                "executes": answering.rows is not None,
                "backend": answering.backend.name,
            },
        }

    async def _logged(self, request: Request, *, chat: bool) -> Response:
        exchange = _Exchange(self._service, request, chat)
        try:
            self._check(request)
            if self._service.state != "ready":
                raise _not_ready(self._service)
            return await exchange.run()
        except ApiError as error:
            exchange.log(error.status, error.code)
            raise
        except ClientDisconnect:
            exchange.log(CLOSED_REQUEST, "client is gone")
            raise


class _Exchange:
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


def _check_host(request: Request, key: str | None) -> None:
    """Without a key, a web page in the user's browser must not reach the server under a name of its own."""
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if key is None and name.lower() not in LOOPBACK:
        raise ApiError(
            403,
            f"a server without a key answers requests to {', '.join(LOOPBACK)} alone, not to {name!r}",
            code="wrong_host",
        )


def _not_ready(service: Service) -> ApiError:
    if service.state == "loading":
        return ApiError(503, "the model is loading; try again in some seconds", code="loading", retry_after=5)
    if service.state == "stopping":
        return ApiError(503, "the server is stopping", code="stopping")
    return ApiError(502, f"the backend is down: {service.fault}", code="backend_down")


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


async def _api_error(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _http_error(request: Request, error: HTTPException) -> Response:
    told = {404: f"no such address: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    shown = ApiError(error.status_code, told.get(error.status_code, error.detail), code="not_found")
    return JSONResponse(shown.body(), error.status_code, headers=error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    shown = ApiError(500, "the server has a fault; its log says more", code="internal_error")
    return JSONResponse(shown.body(), 500)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=CLOSED_REQUEST)
