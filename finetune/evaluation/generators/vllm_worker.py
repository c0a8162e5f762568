"""The child process that computes with vLLM; vllm_process.py starts it, with the Python of vLLM's own environment.

One JSON object a line, on stdin and stdout:

    {"do": "load", "model": FOLDER, "engine": {...}, "ends": [2], "lora": null}
        -> {"loaded": {"vllm": "0.24.0", "seconds": 97.1}}
    {"do": "weights", "model": FOLDER}          the weights of this folder, in place of those that are loaded
        -> {"loaded": {"seconds": 11.5}}
    {"do": "answer", "call": 1, "prompts": [[1, 733], ...], "most": [256, ...], "temperature": 0.0, "seeds": null, "lora": false}
        -> {"at": [3, 0], "new": [5339, 12], "ended": [0], "failed": {}}      after each step: new tokens, and of which prompt
        -> {"done": {"steps": 211, "cached_tokens": 170123}}
    {"do": "abort", "call": 1, "at": [3]}       meanwhile: no more tokens for these prompts

ended: prompts whose answer has its last token: one of `ends`, or the last of `most`. failed: why vLLM does not take a prompt, or
gave up on it. An error of the engine is {"error": "..."}, after which the process ends. It also ends when its parent does.

Prompts and answers are token ids, and where the SQL of an answer ends is for the parent to say (stopping.py). So this process has
nothing to do between two steps, and needs nothing of this project but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

from finetune.sql.engines.confinement import end_with_parent

RESERVED_BYTES = 5 << 29
"""Of the GPU, left to others: the parent merges adapters on it while vLLM holds its cache."""
MOST_MEMORY = 0.92
"""Of the GPU's memory that vLLM takes at most; its own default."""
ADAPTER, ADAPTER_ID = "adapter", 1
FIXED: dict[str, Any] = {
    "skip_tokenizer_init": True,  # token ids come and go
    "enable_prefix_caching": True,
    "generation_config": "vllm",  # no sampling defaults of the model folder
    "disable_log_stats": True,
}
BROKEN = ("abort", "error")
"""vLLM's reasons for the end of an answer that is none."""


class Engine:
    """vLLM's engine with the weights of a folder."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import vllm
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        self.version = str(vllm.__version__)
        self._ends: list[int] = asked["ends"]
        self._adapter: dict[str, Any] | None = asked["lora"]
        arguments = {"model": asked["model"], **FIXED, **_of_gpu(), **_lora(self._adapter), **asked["engine"]}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)

    def load_weights(self, folder: str) -> None:
        """Replace the weights where they are, so that what was compiled and captured for them stays."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept the cache of the other weights")

    def answers(self, asked: dict[str, Any], messages: SimpleQueue[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The replies to a message `answer`. messages: where those to abort come."""
        call = asked["call"]
        places, failed = self._start(asked)
        if failed:
            yield {"at": [], "new": [], "ended": [], "failed": failed}
        steps = cached = 0
        while self._engine.has_unfinished_requests():
            at: list[int] = []
            new: list[int] = []
            ended: list[int] = []
            failed = {}
            for output in self._engine.step():
                place = places.get(output.request_id)
                if place is None:
                    continue
                [part] = output.outputs
                for token in part.token_ids:
                    at.append(place)
                    new.append(token)
                if output.finished:
                    del places[output.request_id]
                    cached += output.num_cached_tokens or 0
                    if part.finish_reason in BROKEN:
                        failed[place] = f"vLLM ended it: {part.finish_reason}"
                    else:
                        ended.append(place)
            steps += 1
            yield {"at": at, "new": new, "ended": ended, "failed": failed}
            self._abort(call, places, messages)
        yield {"done": {"steps": steps, "cached_tokens": cached}}

    def _start(self, asked: dict[str, Any]) -> tuple[dict[str, int], dict[int, str]]:
        """Hand all prompts to the engine, which begins them in this order: those that begin alike are neighbours, so that the
        cache still has what they share. Returns the prompts by the names of their requests, and why others were not taken."""
        from vllm.lora.request import LoRARequest

        prompts = asked["prompts"]
        lora = None
        if asked["lora"]:
            assert self._adapter is not None
            lora = LoRARequest(ADAPTER, ADAPTER_ID, self._adapter["folder"])
        places: dict[str, int] = {}
        failed: dict[int, str] = {}
        for place in sorted(range(len(prompts)), key=prompts.__getitem__):
            name = f"{asked['call']}-{place}"
            prompt = {"type": "token", "prompt_token_ids": prompts[place]}
            try:
                self._engine.add_request(name, prompt, self._sampling(asked, place), lora_request=lora)
            except ValueError as error:
                failed[place] = str(error)
                continue
            places[name] = place
        return places, failed

    def _sampling(self, asked: dict[str, Any], place: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=asked["temperature"],
            seed=asked["seeds"][place] if asked["seeds"] else None,
            max_tokens=asked["most"][place],
            ignore_eos=True,  # the model folder's; ours are these
            stop_token_ids=self._ends,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _abort(self, call: int, places: dict[str, int], messages: SimpleQueue[dict[str, Any]]) -> None:
        names: list[str] = []
        while True:
            try:
                message = messages.get_nowait()
            except Empty:
                break
            if message["call"] == call:
                names += [name for place in message["at"] if (name := f"{call}-{place}") in places]
        if names:
            for name in names:
                del places[name]
            self._engine.abort_request(names)


def _of_gpu() -> dict[str, Any]:
    """How much of the GPU vLLM may take: what is free on it now, without the reserve. On a T4, the attention that needs no
    compiler: FlashInfer's kernels are compiled at their first use, and some of its releases fail there."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    share = round(max(0.05, min(MOST_MEMORY, (free - RESERVED_BYTES) / total)), 3)
    old = {"attention_backend": "TRITON_ATTN"} if torch.cuda.get_device_capability() < (8, 0) else {}
    return {"gpu_memory_utilization": share, **old}


def _lora(adapter: dict[str, Any] | None) -> dict[str, Any]:
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter["rank"]} if adapter else {}


class Replies:
    """Writes the replies, to what was stdout at the start: all that vLLM prints goes to stderr, which is the log."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def send(self, reply: dict[str, Any]) -> None:
        left = memoryview(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
        while left:
            left = left[os.write(self._descriptor, left) :]


def incoming() -> tuple[SimpleQueue[dict[str, Any]], SimpleQueue[dict[str, Any]]]:
    """The requests on stdin, and those to abort. At its end the process ends: its parent has ended, or wants this one to."""
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    aborts: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            (aborts if message["do"] == "abort" else requests).put(message)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests, aborts


def serve(replies: Replies) -> None:
    requests, aborts = incoming()
    engine: Engine | None = None
    while True:
        asked = requests.get()
        started = time.monotonic()
        if asked["do"] == "load":
            engine = Engine(asked)
            replies.send({"loaded": {"vllm": engine.version, "seconds": round(time.monotonic() - started, 2)}})
            continue
        assert engine is not None
        if asked["do"] == "weights":
            engine.load_weights(asked["model"])
            replies.send({"loaded": {"seconds": round(time.monotonic() - started, 2)}})
        else:
            for reply in engine.answers(asked, aborts):
                replies.send(reply)


def main(parent: int) -> None:
    replies = Replies()
    end_with_parent(parent)
    try:
        serve(replies)
    except BaseException as error:  # whatever it is, the parent has to know
        import traceback

        traceback.print_exc()
        replies.send({"error": f"{type(error).__name__}: {error}"})
        sys.stderr.flush()
        os._exit(1)  # at a usual exit vLLM's threads may wait for each other
