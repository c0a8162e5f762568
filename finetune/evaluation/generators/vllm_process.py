"""The process that answers with vLLM (vllm_worker.py), as its parent sees it: start, requests and replies, end.

It runs with the Python of vLLM's environment, in a process group of its own, and ends with this process, however that ends. What
vLLM prints is in a log file, which is kept if something went wrong and is named in the error.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from finetune.errors import TransientError, UserError, shortened

ROOT = Path(__file__).resolve().parents[3]
START_WORKER = (
    "import sys; sys.path.append({root!r}); from finetune.evaluation.generators.vllm_worker import main; main({parent})"
)
SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles kernels at the first use, which needs nvcc
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that none is left on the GPU
}
"""Environment variables of vLLM, unless the user has set them."""
FORCED = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CONFIGURE_LOGGING": "1",
    # Triton multiplies float32 matrices in TF32 (10 bits) unless told otherwise, and vLLM's attention in float32 is Triton's.
    "TRITON_F32_DEFAULT": "ieee",
}
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SETS_NO_SECRET = ("TOKENIZERS_PARALLELISM",)
SILENT_SECONDS = 1800.0
"""Without a reply, after which the process counts as hanging; loading a large model takes minutes."""
END_SECONDS = 10.0
LOG_BYTES = 1 << 16
"""Of the end of the log, in which the reason of a failure is looked for."""
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|No available memory for the cache|less than desired GPU memory|KV cache is needed|"
    r"larger than the (?:available KV cache|maximum number of tokens)",
    re.IGNORECASE,
)
"""vLLM's and torch's messages where the GPU has too little memory."""
_REASON = re.compile(r"(?:^|[\s.])\w*(?:Error|Exception|Interrupt)\b.*:\s*\S")
MEMORY_ADVICE = (
    "end other programs on this GPU (nvidia-smi lists them), use one with more memory, or evaluation.generator=hf, which can "
    "leave the weights in 4 bits"
)


class VllmProcess:
    """A running worker. python: of vLLM's environment. log: the file for what it prints."""

    def __init__(self, python: str, log: Path) -> None:
        self.log = log
        self._python = python
        self._replies: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._started = threading.Event()
        self._call = 0
        self._fault: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel ends the worker when the thread that started it ends: this one lives as long as the worker does.
        threading.Thread(target=self._run, name="vllm replies", daemon=True).start()
        self._started.wait()
        if self._fault is not None:
            raise UserError(
                f"{python}: vLLM's Python does not start ({self._fault.strerror}); set FINETUNE_VLLM to that of the environment "
                "with vLLM",
                code="evaluation.no_vllm",
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def loaded(self, **request: Any) -> dict[str, Any]:
        """Send a request that loads weights, and wait for it. Raises UserError if vLLM cannot load them."""
        self._send(request)
        found: dict[str, Any] = self._next()["loaded"]
        return found

    def tokens(self, **request: Any) -> Iterator[dict[str, Any]]:
        """Send a request for answers. Gives the replies as they come, without the last one, which says that all are there.
        Raises UserError if the engine fails, TransientError if the process is killed or hangs."""
        self._call += 1
        self._send({"do": "answer", "call": self._call, **request})
        while "done" not in (reply := self._next()):
            yield reply

    def abort(self, places: list[int]) -> None:
        """These prompts of the request that is being answered need no more tokens."""
        self._send({"do": "abort", "call": self._call, "at": places})

    def stop(self) -> None:
        """End the worker and all that it has started, at once."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the kernel may wait for the GPU's driver; it ends afterwards
            self._process.wait(END_SECONDS)
        for pipe in (self._process.stdin,):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _run(self) -> None:
        """Start the worker and take its replies, until it ends."""
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [self._python, "-c", START_WORKER.format(root=str(ROOT), parent=os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(),
                    cwd=self.log.parent,
                    start_new_session=True,
                )
        except OSError as error:
            self._fault = error
            return
        finally:
            self._started.set()
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                try:
                    self._replies.put(json.loads(line))
                except ValueError:  # torn by the end of the worker
                    break
        self._replies.put(None)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the missing reply tells
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _next(self) -> dict[str, Any]:
        """The next reply. Raises UserError for an error of the engine, TransientError if the process was killed or hangs."""
        try:
            reply = self._replies.get(timeout=SILENT_SECONDS)
        except Empty:
            self.stop()
            raise TransientError(
                f"vLLM has said nothing for {SILENT_SECONDS / 60:.0f} minutes and was ended; its log: {self.log}",
                code="evaluation.vllm_ended",
            ) from None
        if reply is None or "error" in reply:
            raise self._failure(reply)
        return reply

    def _failure(self, reply: dict[str, Any] | None) -> UserError:
        assert self._process is not None
        self.stop()
        status = self._process.returncode
        if reply is None and status is not None and status < 0:
            return TransientError(
                f"the vLLM process was ended by {signal.Signals(-status).name}"
                f"{' (by the kernel, if memory was short)' if status == -signal.SIGKILL else ''}; its log: {self.log}",
                code="evaluation.vllm_ended",
            )
        end = end_of(self.log)
        reason = reply["error"] if reply else reason_in(end) or f"exit status {status}"
        if _MEMORY.search(reason) or _MEMORY.search(end):
            return UserError(
                f"vLLM has too little memory on this GPU: {_short(reason)}; {MEMORY_ADVICE}; its log: {self.log}",
                code="evaluation.vllm_memory",
            )
        return UserError(
            f"vLLM failed: {_short(reason)}; its log: {self.log}; evaluation.generator=hf does without vLLM",
            code="evaluation.vllm_failed",
        )


def environment() -> dict[str, str]:
    """This process's environment without what looks like a secret: vLLM needs none, since all that it reads is on the disk."""
    kept = {name: value for name, value in os.environ.items() if name in _SETS_NO_SECRET or not _SECRET.search(name)}
    return {**SETTINGS, **kept, **FORCED, "PYTHONUNBUFFERED": "1"}


def end_of(log: Path) -> str:
    """The end of a log; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def reason_in(text: str) -> str:
    """The last line of a log that names an error, else the last line that is no progress bar; "" if there is none."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    said = [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]
    named = [line for line in said if _REASON.search(line)]
    return (named or said or [""])[-1]


def _short(text: str) -> str:
    return shortened((text.strip().splitlines() or [""])[0], 200)
