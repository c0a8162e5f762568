"""The endpoint itself: GET /health and /v1/models, POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finetune.serve.api_errors import ApiError
from finetune.serve.exchange import CLOSED_REQUEST, Exchange
from finetune.serve.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


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
        exchange = Exchange(self._service, request, chat)
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
