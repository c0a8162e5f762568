"""llama.cpp's own server for a GGUF file, on the loopback interface: the package xllamacpp has it without a compiler.

It runs in a process of its own, so that a crash in C++ is an error message here, and ends with the process that started it,
however that ends: it watches a pipe that only its parent holds open. As a program this module is that process.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from finetune.errors import UserError, shortened
from finetune.machine.hardware import usable_cores
from finetune.runtime.installed import install_command

PACKAGE = "xllamacpp"
START_SECONDS = 900.0
"""A file of 15 GB from a slow network disk takes minutes to load."""
END_SECONDS = 10.0
_STAMP = re.compile(r"^[\d.]+ [A-Z] ")
"""Time and level before a line of llama.cpp's log."""


def version() -> str:
    """The version of the package. Raises UserError if it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"the package {PACKAGE} (llama.cpp) is not installed; run `{install_command('export')}`",
            code="install.missing_package",
        )
    return metadata.version(PACKAGE)


class LlamaServer:
    """The server as a context manager. url: http://127.0.0.1:<a free port>; it takes the requests of llama.cpp's server, such as
    /v1/completions, /completion and /tokenize. alive: whether the process still runs.

    context_tokens: of each of the `parallel` slots, that is requests computed at once. gpu_layers: on the GPU; None for as many
    as fit. threads: None for all cores, or OMP_NUM_THREADS. api_key: what requests must send as their bearer token; None for no
    key. Raises UserError if the package is missing or the file does not load.
    """

    def __init__(
        self,
        gguf: Path,
        *,
        context_tokens: int = 4096,
        parallel: int = 4,
        gpu_layers: int | None = None,
        threads: int | None = None,
        api_key: str | None = None,
        alias: str | None = None,
    ) -> None:
        version()
        self.gguf, self.api_key = gguf, api_key
        self._settings = {
            "model": str(gguf.absolute()),
            "n_ctx": context_tokens * parallel,
            "n_parallel": parallel,
            "gpu_layers": gpu_layers,
            "threads": threads or _threads(),
            "api_key": api_key,
            "alias": alias or gguf.stem,
        }
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> LlamaServer:
        if not self.gguf.is_file():
            raise UserError(f"{self.gguf}: no such file", code="llama.load_failed")
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this process
        )
        try:
            self.url = self._started()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End the process. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
            process.kill()  # it has nothing to save
            process.wait(END_SECONDS)
        if self._log:
            self._log.close()
            self._log = None

    def request(self, path: str, body: dict[str, Any], timeout: float = 60.0) -> Any:
        """The JSON answer to one request. Raises UserError if the server has ended or refuses the request."""
        connection, response = self._post(path, body, timeout)
        try:
            return json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(error) from error
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any], timeout: float = 600.0) -> Generator[Any, None, None]:
        """The JSON events of one request as they come; leaving the loop ends the request in the server. timeout: seconds between
        two events. Raises as `request`."""
        connection, response = self._post(path, body | {"stream": True}, timeout)
        try:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(error) from error
        finally:
            connection.close()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text as llama.cpp makes them."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self.request("/tokenize", body)["tokens"]]

    def _post(
        self, path: str, body: dict[str, Any], timeout: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._lost(error) from error
        if response.status != 200:
            text = response.read().decode(errors="replace")
            connection.close()
            raise UserError(
                f"{self.gguf}: llama.cpp's server refused a request ({response.status}: {shortened(text, 200)})",
                code="llama.refused",
            )
        return connection, response

    def _started(self) -> str:
        """The URL that the process prints once the model is loaded."""
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it has ended, and its log says why
            pass
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            ready, _, _ = select.select([self._process.stdout], [], [], 1.0)
            if ready:
                line = self._process.stdout.readline()
                if line:
                    return str(json.loads(line)["url"])
                break
        reason = (
            self._reason() if self._process.poll() is not None or ready else f"not ready after {START_SECONDS:.0f} s"
        )
        raise UserError(f"{self.gguf}: llama.cpp cannot load it ({reason})", code="llama.load_failed")

    def _lost(self, error: BaseException) -> UserError:
        if isinstance(error, TimeoutError) and self.alive:
            return UserError(f"{self.gguf}: llama.cpp's server did not answer in time", code="llama.lost")
        return UserError(f"{self.gguf}: llama.cpp's server has ended ({self._reason()})", code="llama.lost")

    def _reason(self) -> str:
        """The last line of the log that says what went wrong."""
        if self._log is None:
            return "it was closed"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        line = telling[0] if telling else lines[-1] if lines else "it said nothing"
        return shortened(_STAMP.sub("", line), 200)


def _threads() -> int:
    """All cores, or as many as OMP_NUM_THREADS says: beside other busy programs llama.cpp is faster on fewer."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else usable_cores()


def main() -> None:
    """The process: reads its settings from standard input, serves, and ends when that is closed."""
    settings = json.loads(sys.stdin.buffer.readline())
    ended = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        ended.set()
        os._exit(0)  # also while the model is loading

    threading.Thread(target=watch, daemon=True).start()
    answers = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    server = _serve(settings)
    os.write(answers, json.dumps({"url": server.listening_address}).encode() + b"\n")
    os.close(answers)
    ended.wait()


def _serve(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["alias"]}
    params.n_ctx, params.n_parallel = settings["n_ctx"], settings["n_parallel"]
    params.hostnames, params.port = ["127.0.0.1"], 0
    if settings["gpu_layers"] is not None:
        params.n_gpu_layers = settings["gpu_layers"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    if settings["api_key"]:
        params.api_keys = [settings["api_key"]]
    params.cache_ram_mib = 0  # else up to 8 GiB of earlier prompts are kept beside the model
    params.ui, params.offline, params.endpoint_slots = False, True, False
    params.verbosity = 1
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
