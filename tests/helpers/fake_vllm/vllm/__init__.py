"""Stands for vLLM 0.24 where there is no GPU: what vllm_worker.py uses of its interface, over a tiny model of transformers.

FAKE_VLLM, a JSON object, makes it fail as the real one does: {"load": MESSAGE} while it is loaded, {"kill": N} by SIGKILL at step
N, {"raise": [N, MESSAGE]} and {"hang": N} at step N, {"error": [ID, ...]} for requests that end with an error. {"pause": S} makes
each step take S seconds longer. With {"seen": FILE} it writes a line of JSON for each thing that it was asked. With
{"script": [IDS, ...]} it needs no model: the answer to the Nth request is the tokens of IDS[N % length], over and over.
"""

from __future__ import annotations

import json
import os
import signal
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

__version__ = "0.24.0"
FAULTS: dict[str, Any] = json.loads(os.environ.get("FAKE_VLLM") or "{}")


def seen(**what: Any) -> None:
    if "seen" in FAULTS:
        with Path(FAULTS["seen"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


@dataclass
class EngineArgs:
    model: str
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    enable_prefix_caching: bool | None = None
    generation_config: str = "auto"
    disable_log_stats: bool = False
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16


@dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    new: list[int] = field(default_factory=list)
    script: list[int] | None = None
    generator: Any = None


class LLMEngine:
    def __init__(self, arguments: EngineArgs) -> None:
        if "load" in FAULTS:
            raise ValueError(FAULTS["load"])
        print("the fake engine prints to stdout")  # as vLLM's log does
        self._arguments = arguments
        self._waiting: dict[str, Request] = {}
        self._steps = self._asked = 0
        self._load(arguments.model)
        seen(loaded=arguments.__dict__)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, usage_context: Any = None) -> LLMEngine:
        return cls(engine_args)

    def _load(self, folder: str) -> None:
        if "script" in FAULTS:
            assert (Path(folder) / "config.json").is_file()
            return
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self._arguments.dtype))
        self._model.eval()
        self._adapted: Any = None

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        assert not self._waiting
        self._load(kwargs["weights_path"])
        seen(reloaded=kwargs["weights_path"])
        return [None]

    def reset_prefix_cache(self) -> bool:
        seen(reset=True)
        return True

    def add_request(
        self, request_id: str, prompt: dict[str, Any], params: SamplingParams, lora_request: LoRARequest | None = None
    ) -> str:
        assert prompt["type"] == "token"
        ids = prompt["prompt_token_ids"]
        if not ids:
            raise ValueError("The decoder prompt cannot be empty")
        if self._arguments.max_model_len is not None and len(ids) >= self._arguments.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        request = Request(ids, params, lora_request)
        if "script" in FAULTS:
            request.script = FAULTS["script"][self._asked % len(FAULTS["script"])]
        elif params.seed is not None:
            import torch

            request.generator = torch.Generator().manual_seed(params.seed)
        self._asked += 1
        self._waiting[request_id] = request
        seen(request=request_id, prompt=ids, temperature=params.temperature, seed=params.seed, most=params.max_tokens)
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def abort_request(self, request_ids: list[str]) -> None:
        seen(aborted=request_ids)
        for name in request_ids:
            del self._waiting[name]

    def step(self) -> list[RequestOutput]:
        self._steps += 1
        time.sleep(FAULTS.get("pause", 0))
        if FAULTS.get("kill") == self._steps:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULTS.get("hang") == self._steps:
            time.sleep(3600)
        if "raise" in FAULTS and FAULTS["raise"][0] == self._steps:
            raise RuntimeError(FAULTS["raise"][1])
        found = [self._next(name, request) for name, request in self._waiting.items()]
        for output in found:
            if output.finished:
                del self._waiting[output.request_id]
        return found

    def _next(self, name: str, request: Request) -> RequestOutput:
        if name in FAULTS.get("error", []):
            return RequestOutput(name, [CompletionOutput([], "error")], True)
        token = self._token(request)
        request.new.append(token)
        reason = None
        if token in request.params.stop_token_ids:
            reason = "stop"
        elif len(request.new) == request.params.max_tokens:
            reason = "length"
        return RequestOutput(name, [CompletionOutput([token], reason)], reason is not None)

    def _token(self, request: Request) -> int:
        if request.script is not None:
            return request.script[len(request.new) % len(request.script)]
        import torch

        model = self._with_adapter(request.lora) if request.lora else self._model
        with torch.inference_mode():
            logits = model(torch.tensor([[*request.prompt, *request.new]])).logits[0, -1].float()
        if not request.params.temperature:
            return int(logits.argmax())
        chances = torch.softmax(logits / request.params.temperature, dim=-1)
        return int(torch.multinomial(chances, 1, generator=request.generator))

    def _with_adapter(self, lora: LoRARequest) -> Any:
        from peft import PeftModel

        assert self._arguments.enable_lora
        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(deepcopy(self._model), lora.lora_path).eval()
        return self._adapted
