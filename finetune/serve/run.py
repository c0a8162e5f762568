"""`finetune serve`: one server with its backend, from the first to the last second."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from finetune.data.limits import limits_of
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, EXIT_USER_ERROR, UserError
from finetune.runtime.console import visible
from finetune.serve.answering import Answering
from finetune.serve.app import LOOPBACK, application
from finetune.serve.backends.base import Running
from finetune.serve.backends.registry import backend_for
from finetune.serve.databases import databases_of
from finetune.serve.load import Heartbeat, Queue
from finetune.serve.rows import Rows
from finetune.serve.service import Service
from finetune.serve.target import open_target

WAITING = 128
"""Requests that wait while as many as the backend takes are answered; further ones get status 429."""
LEAST_KEY_CHARACTERS = 16
POLL_SECONDS = 0.25
FAILED_SECONDS = 2.0
"""How long a server whose backend is down still answers that it is."""
SOCKET_PATH_BYTES = 107
"""Of a Unix socket: man 7 unix, sun_path without its last zero."""
GRACE_SECONDS = 10
"""For requests that are being answered when the server stops."""


@dataclass(frozen=True)
class Options:
    """port: 0 for any free one. databases: NAME=FILE or FILE. api_key_env: the variable that holds the key. idle_minutes and
    max_hours: after which the server ends by itself; 0: never. heartbeat: a file for `Heartbeat`."""

    host: str = "127.0.0.1"
    port: int = 8000
    databases: Sequence[str] = ()
    execute: bool = False
    backend: str = "auto"
    api_key_env: str | None = None
    idle_minutes: float = 0.0
    max_hours: float = 0.0
    waiting: int = WAITING
    heartbeat: Path | None = None


def serve(path: Path, options: Options) -> int:
    """Serve a run or an export until a signal, `idle_minutes` or `max_hours` ends it. Returns the exit code: 75 if the backend
    ended after it had been ready, 2 if it never was. Raises UserError for everything that is known before."""
    key = _key(options)
    with _listening(options) as listener:
        target = open_target(path)
        databases = databases_of(options.databases, target.dialect_for(None))
        if options.execute and not any(database.dialect for database in databases.all):
            raise UserError(
                "--execute: give a database with --db NAME=FILE; a schema has no rows", code="serve.nothing_to_execute"
            )
        backend = backend_for(options.backend, target)
        evaluation = target.config.evaluation
        rows = Rows(limits_of(evaluation), evaluation.timeout_seconds) if options.execute else None
        try:
            server = _Server(listener, options, key, Answering(target, databases, backend, rows))
            with _private_folder() as folder:
                return asyncio.run(server.run(folder))
        finally:
            if rows is not None:
                rows.close()


class _Server:
    def __init__(self, listener: socket.socket, options: Options, key: str | None, answering: Answering) -> None:
        self._listener, self._options, self._answering = listener, options, answering
        self._key = key
        self._began = time.monotonic()
        host, port = listener.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._code = EXIT_OK

    async def run(self, folder: Path) -> int:
        backend = self._answering.backend
        queue = Queue(backend.parallel, self._options.waiting)
        service = Service(self._answering, queue, self._key, _log)
        web = _web(application(service))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, web, service, f"stopped by {signal.Signals(number).name}")
        process = backend.start(folder, self._options.api_key_env)
        try:
            watching = asyncio.ensure_future(self._watch(web, service, process))
            await web.serve(sockets=[self._listener])
            await watching
        finally:
            with suppress(Exception):
                await backend.close()
            await self._answering.schemas.close()
            await asyncio.to_thread(process.stop)
        self._beat("stopped", queue, now=True)
        return self._code

    def _stop(self, web: uvicorn.Server, service: Service, why: str) -> None:
        if web.should_exit:  # a second signal: at once
            web.force_exit = True
            return
        _say(why)
        service.state = "failed" if service.fault else "stopping"
        web.should_exit = True

    async def _watch(self, web: uvicorn.Server, service: Service, process: Running) -> None:
        """Everything that happens beside the requests."""
        self._heartbeat = Heartbeat(self._options.heartbeat, self.address) if self._options.heartbeat else None
        connected = False
        while not web.should_exit:
            if process.code is not None:
                self._backend_ended(service, process)
                await asyncio.sleep(FAILED_SECONDS)
                self._stop(web, service, f"the backend {self._answering.backend.name} ended{_because(service.fault)}")
                break
            if service.state == "loading":
                if not connected and (address := process.address):
                    await self._answering.backend.connect(address)
                    connected = True
                if connected and await self._answering.backend.is_ready():
                    service.state = "ready"
                    service.queue.last_active = time.monotonic()
                    _say(_ready(self.address, service, self._options, time.monotonic() - self._began))
            elif self._is_idle(service.queue):
                self._stop(web, service, f"no request for {self._options.idle_minutes:g} minutes")
            if self._options.max_hours and time.monotonic() - self._began > 3600 * self._options.max_hours:
                self._stop(web, service, f"--max-hours {self._options.max_hours:g} is over")
            self._beat(service.state, service.queue)
            await asyncio.sleep(POLL_SECONDS)

    def _backend_ended(self, service: Service, process: Running) -> None:
        was_ready = service.state == "ready"
        self._code = EXIT_TRANSIENT if was_ready else EXIT_USER_ERROR
        words = process.last_words().removeprefix("finetune: ")
        service.fault = _fault(process.code or 0, words)
        service.state = "failed"

    def _is_idle(self, queue: Queue) -> bool:
        minutes = self._options.idle_minutes
        return bool(minutes) and queue.idle_seconds() > 60 * minutes

    def _beat(self, state: str, queue: Queue, *, now: bool = False) -> None:
        if self._heartbeat is not None:
            try:
                self._heartbeat.beat(state, queue, now=now)
            except UserError as error:  # a full disk does not end a server
                _say(f"--heartbeat: {error}")
                self._heartbeat = None

    _heartbeat: Heartbeat | None = None


def _web(app: object) -> uvicorn.Server:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=512,
        limit_concurrency=1024,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return _WithoutSignals(config)


class _WithoutSignals(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _key(options: Options) -> str | None:
    """The key that clients have to show. Raises UserError if it is missing or short, or if another machine could connect without
    one."""
    if options.api_key_env is None:
        if options.host not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"--host {options.host}: other machines could connect without a key; keep 127.0.0.1 and use `ssh -L`, or name a "
                "variable that holds a key with --api-key-env",
                code="serve.open_without_key",
            )
        return None
    key = os.environ.get(options.api_key_env, "")
    if len(key) < LEAST_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"--api-key-env: the variable {options.api_key_env} {'is not set' if not key else 'holds no good key'}; set it to a "
            f"key of {LEAST_KEY_CHARACTERS} characters or more, letters and digits, for example from `openssl rand -hex 24`",
            code="serve.weak_key",
        )
    return key


@contextmanager
def _listening(options: Options) -> Iterator[socket.socket]:
    """The socket, bound before anything is loaded. Raises UserError if the port is in use."""
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
    except OSError as error:
        raise UserError(f"--host {options.host}: {error.strerror or error}", code="serve.bad_address") from None
    with closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(512)
        except OSError as error:
            raise UserError(
                f"--port {options.port}: {options.host} cannot be listened on there ({error.strerror or error}); end the program "
                "that uses the port, or choose another with --port",
                code="serve.port_in_use",
            ) from None
        yield listener


@contextmanager
def _private_folder() -> Iterator[Path]:
    """For the backend's sockets and its log; in /tmp where the path of a socket in TMPDIR would be too long."""
    private = "finetune-serve."
    longest = len(os.fsencode(tempfile.gettempdir())) + len(f"/{private}XXXXXXXX/backend.sock")
    try:
        folder = Path(tempfile.mkdtemp(prefix=private, dir="/tmp" if longest > SOCKET_PATH_BYTES else None))
    except OSError as error:
        raise UserError(
            f"no folder can be made for the backend ({error.strerror}: {error.filename}); set TMPDIR to another one",
            code="serve.no_folder",
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fault(code: int, words: str) -> str:
    """Why a backend ended. code: negative for a signal, or above 128 as a shell has it. words: the last ones of its log."""
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:  # which it could not log, so its last words are about something else
        return "it was killed (SIGKILL), as the kernel does when memory is used up"
    return words or f"it ended with exit code {code} without a word"


def _because(fault: str) -> str:
    return f": {fault}" if fault else ""


def _ready(address: str, service: Service, options: Options, seconds: float) -> str:
    """What is printed once: the address and how to ask."""
    answering = service.answering
    names = answering.databases.names
    host, port = address.removeprefix("http://").rsplit(":", 1)
    schema = f'"database": "{names[0]}"' if names else '"schema": "CREATE TABLE item (id INTEGER, name TEXT);"'
    extra = f"database={names[0]!r}" if names else 'schema="CREATE TABLE item (id INTEGER, name TEXT);"'
    key = f'os.environ["{options.api_key_env}"]' if options.api_key_env else '"none"'
    body = f'{{"model": "{service.model}", {schema}, "messages": [{{"role": "user", "content": "How many items are there?"}}]}}'
    header = f' -H "Authorization: Bearer ${options.api_key_env}"' if options.api_key_env else ""
    local = address if host in LOOPBACK else f"http://127.0.0.1:{port}"
    return "\n".join((
        f"ready after {math.ceil(seconds)} s: {address}/v1, model {service.model}, backend {answering.backend.name}, databases: "
        f"{', '.join(names) or 'none'}{', SQL is executed' if answering.rows else ''}",
        f"  curl {local}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  python: openai.OpenAI(base_url="{local}/v1", api_key={key}).chat.completions.create(model="{service.model}", '
        f'messages=[{{"role": "user", "content": "How many items are there?"}}], extra_body=dict({extra}))',
        f'  finetune ask {local} "How many items are there?" --db {names[0] if names else "FILE"}',
        f"  from another machine: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}",
    ))  # fmt: skip


def _say(text: str) -> None:
    with suppress(OSError):
        print(f"finetune: {visible(text)}", file=sys.stderr, flush=True)


def _log(line: str) -> None:
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {visible(line, one_line=True)}", file=sys.stderr, flush=True)
