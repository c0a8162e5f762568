"""Asks an endpoint of `finetune serve`, or any other that speaks OpenAI's API, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import UserError, shown
from finetune.runtime.console import say
from finetune.runtime.files import parse_json

SECONDS = 300.0
LARGEST_REPLY = 64 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Served:
    """What an endpoint serves. executes: whether it runs the SQL and sends rows."""

    model: str
    dialects: tuple[str, ...]
    databases: tuple[str, ...]
    executes: bool


@dataclass(frozen=True)
class Advice:
    """What errors say to do. key: if the server wants another key. address: if it answers as no such server does."""

    key: str = "name the variable that holds it with --api-key-env"
    address: str = "is this the address of `finetune serve`?"


@dataclass
class Endpoint:
    """url: of the server, with /v1 or without. key: None for a server without one. seconds: for one whole reply. Every method
    raises UserError, in one line."""

    url: str
    key: str | None = field(default=None, repr=False)
    seconds: float = SECONDS
    advice: Advice = Advice()
    cut: bool = field(default=False, init=False)
    """Whether the last answer had as many tokens as it might have."""
    new_tokens: int | None = field(default=None, init=False)
    """Of the last answer; None if the server does not say."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if not self._host or parts.query or parts.fragment or parts.username:
            raise UserError(
                f"{shown(self.url)[1:-1]}: expected the address of a server, such as http://127.0.0.1:8000",
                code="endpoint.bad_url",
            )
        self._secure = parts.scheme.lower() == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        if self.key and not self._secure and self._host not in LOOPBACK:
            say(f"{self.url}: the key travels unencrypted; `ssh -L` to the machine, or https, would hide it")

    def served(self) -> Served:
        """Raises UserError if it is no endpoint of finetune, too."""
        reply = self._request("GET", "/v1/models")
        try:
            [model] = [entry for entry in reply["data"] if entry.get("owned_by") == "finetune"][:1]
            told = model["finetune"]
            return Served(str(model["id"]), _texts(told["dialects"]), _texts(told["databases"]), bool(told["executes"]))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{self.url}: not an endpoint of `finetune serve`, which alone knows the prompt that the model was trained on",
                code="endpoint.not_finetune",
            ) from None

    def ask(self, question: str, served: Served, **extra: str | int | None) -> tuple[str, dict[str, Any] | None]:
        """The SQL of the answer ("" if it has none), and the rows if the server has sent them: {"columns", "rows", "truncated"},
        or {"error"}. extra: database or schema, dialect, evidence, max_tokens."""
        message = {"role": "user", "content": question}
        body = {"model": served.model, "messages": [message], **{k: v for k, v in extra.items() if v is not None}}
        reply = self._request("POST", "/v1/chat/completions", body)
        try:
            answer = reply["choices"][0]["message"]
            self.cut = reply["choices"][0].get("finish_reason") == "length"
            self.new_tokens = (reply.get("usage") or {}).get("completion_tokens")
            rows = answer.get("finetune")
            return str(answer["content"]), None if rows is None else _rows(rows)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self._odd("no answer in its reply") from None

    def complete(self, model: str, system: str, user: str, temperature: float) -> str:
        """The text with which any OpenAI-compatible server goes on after two messages. Its address ends as that server's manual
        says, which need not be /v1."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": model, "messages": messages, "temperature": temperature}
        path = urlsplit(self.url).path.rstrip("/")
        place = "/v1/chat/completions" if path.endswith("/v1") or not path else "/chat/completions"
        reply = self._request("POST", place, body)
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError):
            raise self._odd("no answer in its reply") from None

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.seconds)
        began = time.monotonic()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            content = self._content(response, began)
        except TimeoutError:
            raise UserError(
                f"{self.url}: no answer within {self.seconds:.0f} seconds", code="endpoint.timeout"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"{self.url}: not reachable ({_reason(error)}); is the server running, and for another machine the tunnel "
                "(`ssh -L`)?",
                code="endpoint.unreachable",
            ) from None
        finally:
            connection.close()
        if len(content) > LARGEST_REPLY:
            raise self._odd(f"a reply of more than {LARGEST_REPLY >> 20} MiB")
        if place := response.getheader("Location"):
            raise self._odd(f"status {response.status}, moved to {shown(place)[1:-1]}, and no redirect is followed")
        return self._read(response.status, response.getheader("Content-Type") or "", content)

    def _content(self, response: http.client.HTTPResponse, began: float) -> bytes:
        """Of at most LARGEST_REPLY bytes and one more. The socket's own limit holds for each piece, not for all of them."""
        pieces, size = [], 0
        while size <= LARGEST_REPLY and (piece := response.read1(1 << 16)):
            pieces.append(piece)
            size += len(piece)
            if time.monotonic() - began > self.seconds:
                raise TimeoutError
        return b"".join(pieces)

    def _read(self, status: int, kind: str, content: bytes) -> Any:
        try:
            value = parse_json(content)
        except ValueError:
            if status >= 500:
                raise self._failed(status) from None
            what = "HTML" if "html" in kind.lower() or content.lstrip()[:1] == b"<" else "something else"
            raise self._odd(f"{what} instead of JSON, with status {status}") from None
        if status == 200:
            return value
        error = value.get("error") if isinstance(value, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        if status == 401:
            raise UserError(
                f"{self.url}: {'the key is wrong' if self.key else 'it wants a key'}; {self.advice.key}",
                code="endpoint.wrong_key",
            )
        if message is None:
            if status >= 500:
                raise self._failed(status)
            raise self._odd(f"status {status} without a reason")
        raise UserError(f"{self.url}: {message}", code="endpoint.refused")

    def _failed(self, status: int) -> UserError:
        return UserError(
            f"{self.url}: the server failed (status {status}) and gave no reason; try again, or look at its log",
            code="endpoint.failed",
        )

    def _odd(self, what: str) -> UserError:
        return UserError(f"{self.url}: {what}; {self.advice.address}", code="endpoint.odd_reply")


def _texts(value: Any) -> tuple[str, ...]:
    """Raises TypeError unless it is a list of texts."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("no list of texts")
    return tuple(value)


def _rows(value: Any) -> dict[str, Any]:
    """Raises TypeError unless it is {"columns", "rows"} and perhaps more, or {"error"}."""
    found = dict(value)
    if "rows" not in found:
        return found | {"error": str(found.get("error"))}
    if not isinstance(found["rows"], list) or not all(isinstance(row, list) for row in found["rows"]):
        raise TypeError("no list of rows")
    _texts(found.get("columns"))
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it does not speak HTTP ({type(error).__name__})"
