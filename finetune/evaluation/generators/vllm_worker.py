"""The child process that answers with vLLM; vllm_process.py starts it, with the Python of vLLM's own environment.

One JSON object a line, on stdin and stdout, and one request at a time:

    {"do": "load", "model": FOLDER, "tokenizer": FOLDER, "engine": {...}, "ends": [2], "lora": null}
        -> {"loaded": {"vllm": "0.24.0", "seconds": 97.1}}
    {"do": "weights", "model": FOLDER}          the weights of this folder, in place of those that are loaded
        -> {"loaded": {"seconds": 11.5}}
    {"do": "answer", "prompts": [[1, 733], ...], "dialects": [...], "most": [256, ...], "temperature": 0.0, "seeds": null, "lora": false}
        -> {"answer": 3, "ids": [5339, ...]}    for each prompt, as soon as it is complete, in any order
        -> {"answer": 7, "failed": "why"}       where vLLM does not take the prompt, or fails with it
        -> {"done": {"steps": 211, "cached_tokens": 170123}}

An error of the engine is {"error": "..."}, after which the process ends. It also ends when its parent does.

Prompts come as token ids, and answers go as token ids. Where one ends is decided by stopping.py, as for every generator: vLLM
itself knows the end-of-text tokens only, and a request is aborted once its SQL is complete.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from finetune.evaluation.generators.stopping import EndOfAnswers, GrowingAnswer
from finetune.sql.engines.confinement import end_with_parent

RESERVED_BYTES = 5 << 29
"""Of the GPU, left to others: the parent merges adapters on it while vLLM holds its cache."""
MOST_MEMORY = 0.92
"""Of the GPU's memory that vLLM takes at most; its own default."""
LORA_ID = 1
ADAPTER = "adapter"


@dataclass
class Growing:
    """A request in the engine. place: of its prompt in the message."""

    place: int
    answer: GrowingAnswer


class Replies:
    """Writes the replies, to what was stdout at the start: everything that vLLM prints goes to stderr, which is the log."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def send(self, **reply: Any) -> None:
        left = memoryview(json.dumps(reply).encode() + b"\n")
        while left:
            left = left[os.write(self._descriptor, left) :]


class Engine:
    """vLLM's engine with the weights of a folder."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import vllm
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        self.version = str(vllm.__version__)
        self._ends = [int(token) for token in asked["ends"]]
        tokenizer = AutoTokenizer.from_pretrained(
            asked["tokenizer"], trust_remote_code=asked["engine"]["trust_remote_code"]
        )
        self._common = EndOfAnswers(tokenizer, self._ends)
        arguments = {"model": asked["model"], **FIXED, **_memory(), **_lora(asked["lora"]), **asked["engine"]}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        self._adapter = asked["lora"]
        self._requests = 0

    def load_weights(self, folder: str) -> None:
        """Replace the weights where they are, so that what was compiled and captured for them stays."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept the cache of the other weights")

    def answers(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The replies to a message `answer`."""
        growing, failed = self._start(asked)
        yield from failed
        steps = cached = 0
        while self._engine.has_unfinished_requests():
            complete: list[str] = []
            for output in self._engine.step():
                request = growing.get(output.request_id)
                if request is None:  # aborted a step ago
                    continue
                [part] = output.outputs
                if _ended(request.answer, part.token_ids) or output.finished:
                    del growing[output.request_id]
                    cached += getattr(output, "num_cached_tokens", None) or 0
                    if not output.finished:
                        complete.append(output.request_id)
                    yield _reply(request, part.finish_reason)
            if complete:
                self._engine.abort_request(complete)
            steps += 1
        for request in growing.values():
            yield {"answer": request.place, "failed": "vLLM gave no answer"}
        yield {"done": {"steps": steps, "cached_tokens": cached}}

    def _start(self, asked: dict[str, Any]) -> tuple[dict[str, Growing], list[dict[str, Any]]]:
        """Hand all requests to the engine, which begins them in this order: prompts that begin alike are neighbours, so that the
        cache still has what they share. Returns them by id, and the replies for those that it does not take."""
        from vllm.lora.request import LoRARequest

        prompts = asked["prompts"]
        lora = LoRARequest(ADAPTER, LORA_ID, self._adapter["folder"]) if asked["lora"] else None
        growing: dict[str, Growing] = {}
        failed = []
        for place in sorted(range(len(prompts)), key=lambda i: prompts[i]):
            self._requests += 1
            name = str(self._requests)
            prompt = {"type": "token", "prompt_token_ids": prompts[place]}
            try:
                self._engine.add_request(name, prompt, self._sampling(asked, place), lora_request=lora)
            except ValueError as error:
                failed.append({"answer": place, "failed": str(error)})
                continue
            growing[name] = Growing(place, self._common.answer(asked["dialects"][place]))
        return growing, failed

    def _sampling(self, asked: dict[str, Any], place: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=asked["temperature"],
            seed=asked["seeds"][place] if asked["seeds"] else None,
            max_tokens=asked["most"][place],
            ignore_eos=True,  # the model folder's; ours are in stop_token_ids
            stop_token_ids=self._ends,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


FIXED: dict[str, Any] = {
    "skip_tokenizer_init": True,  # token ids come and go
    "enable_prefix_caching": True,
    "generation_config": "vllm",  # no sampling defaults of the model folder
    "disable_log_stats": True,
}


def _memory() -> dict[str, Any]:
    """How much of the GPU vLLM may take: what is free on it now, without the reserve."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(max(0.05, min(MOST_MEMORY, (free - RESERVED_BYTES) / total)), 3)}


def _lora(adapter: dict[str, Any] | None) -> dict[str, Any]:
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter["rank"]} if adapter else {}


def _ended(answer: GrowingAnswer, tokens: Sequence[int]) -> bool:
    return any(answer.add(token) for token in tokens)


def _reply(request: Growing, finish_reason: str | None) -> dict[str, Any]:
    if finish_reason in ("abort", "error") and not request.answer.complete:
        return {"answer": request.place, "failed": f"vLLM ended it: {finish_reason}"}
    return {"answer": request.place, "ids": request.answer.ids}


def requests() -> SimpleQueue[dict[str, Any] | None]:
    """The messages on stdin. The process ends with it: the parent has ended, or wants this one to."""
    found: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            found.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return found


def serve(replies: Replies) -> None:
    waiting = requests()
    engine: Engine | None = None
    while (asked := waiting.get()) is not None:
        started = time.monotonic()
        if asked["do"] == "load":
            engine = Engine(asked)
            replies.send(loaded={"vllm": engine.version, "seconds": round(time.monotonic() - started, 2)})
        elif asked["do"] == "weights":
            assert engine is not None
            engine.load_weights(asked["model"])
            replies.send(loaded={"seconds": round(time.monotonic() - started, 2)})
        else:
            assert engine is not None
            for reply in engine.answers(asked):
                replies.send(**reply)


def main(parent: int) -> None:
    replies = Replies()
    end_with_parent(parent)
    try:
        serve(replies)
    except BaseException as error:  # whatever it is, the parent has to know
        import traceback

        traceback.print_exc()
        replies.send(error=f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(1)  # vLLM's threads and its interpreter-exit hooks may wait for each other
