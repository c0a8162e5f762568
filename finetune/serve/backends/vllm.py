"""vLLM's own server as a backend, on GPUs: vllm_launch.py starts it, with the Python of vLLM's environment and the weights that
`finetune evaluate` computes with.

Written for vLLM 0.24 (vllm/entrypoints/openai/cli_args.py and completion/protocol.py): /v1/completions takes token ids, and with
`return_token_ids` gives those of the answer as they come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.vllm_process import FORCED, environment
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import load_json, parse_json
from finetune.serve.backends.base import Running
from finetune.serve.backends.tokens import TokenStream, Vocabulary
from finetune.serve.process import GuardedProgram, backend_environment
from finetune.serve.target import Target

PARALLEL = 256
"""Answers that are computed at once; vLLM itself decides how many of them fit into its cache."""
MODEL, ADAPTER = "base", "adapter"
"""The names under which vLLM serves the weights, and the adapter beside them."""
WRITTEN = "weights.json"
SOCKET = "vllm.sock"


class VllmBackend(TokenStream):
    """See `Backend`."""

    name = "vllm"
    parallel = PARALLEL

    def __init__(self, target: Target, vocabulary: Vocabulary) -> None:
        self._target = target
        self._folder: Path | None = None
        super().__init__(vocabulary, self._ask, _tokens)

    def start(self, folder: Path, hidden: str | None) -> Running:
        self._folder = folder
        words = [
            sys.executable,
            "-m",
            "finetune.serve.backends.vllm_launch",
            str(self._target.path.resolve()),
            str(folder),
        ]
        return _Running(
            words, backend_environment(hidden), socket=folder / SOCKET, log=folder / "backend.log", folder=folder
        )

    async def is_ready(self) -> bool:
        """Once it is: the folder with the merged weights is deleted, and the length that vLLM has room for is read."""
        if not await super().is_ready():
            return False
        assert self._client is not None and self._folder is not None
        with suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
            models = parse_json((await self._client.get("/v1/models")).content)["data"]
            found = [int(model["max_model_len"]) for model in models if model.get("max_model_len")]
            if found:
                known = self.vocabulary
                most = min(found + ([known.positions] if known.positions else []))
                self.vocabulary = Vocabulary(known.tokenizer, known.ends, most)
        remove_written(self._folder)
        return True

    def _ask(self, ids: list[int], room: int) -> tuple[str, dict[str, Any]]:
        apart = is_apart(self._target.config, self._target.adapter)
        body = {
            "model": ADAPTER if apart else MODEL,
            "prompt": ids,
            "max_tokens": room,
            "temperature": 0.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "stream": True,
            "return_token_ids": True,
            "ignore_eos": True,  # that of the model folder; ours are in stop_token_ids
            "stop_token_ids": self.vocabulary.ends,
        }
        return "/v1/completions", body


class _Running(GuardedProgram):
    """The guarded program; what it has written goes with it."""

    def __init__(self, words: list[str], environment: dict[str, str], *, socket: Path, log: Path, folder: Path) -> None:
        super().__init__(words, environment, socket=socket, log=log)
        self._folder = folder

    def stop(self) -> None:
        super().stop()
        remove_written(self._folder)


def remove_written(folder: Path) -> None:
    """Delete the weights that vllm_launch.py has written for vLLM, which it names in WRITTEN."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        written = load_json(folder / WRITTEN)
        remove_tree(Path(written["folder"]), inside=Path(written["root"]), ignore_errors=True)


def is_apart(config: RunConfig, adapter: Path | None) -> bool:
    """Whether the adapter is computed beside the weights, as evaluation.adapter says."""
    return config.evaluation.adapter == "apart" and adapter is not None


def command(
    *, python: str, model: Path, tokenizer: Path, socket: Path, dtype: str, config: RunConfig, memory: float | None,
    adapter: tuple[Path, int] | None, options: Mapping[str, object],
) -> list[str]:  # fmt: skip
    """The command line of vLLM's server. memory: the part of the GPU that it may take. adapter: its folder and rank, where it is
    computed beside the weights. options: of vLLM's EngineArgs, in place of ours."""
    engine: dict[str, object] = {
        "dtype": dtype,
        "max_model_len": "auto",  # as many tokens as fit into the memory that is left
        "seed": config.training.seed,
        "generation_config": "vllm",  # no sampling defaults of the model folder
        "enable_prefix_caching": True,
        "trust_remote_code": config.model.trust_remote_code,
    }
    engine |= {"gpu_memory_utilization": memory} if memory is not None else {}
    if adapter is not None:
        engine |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter[1]}
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--tokenizer", str(tokenizer)]
    words += ["--served-model-name", MODEL, "--uds", str(socket)]
    words += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    words += ["--lora-modules", f"{ADAPTER}={adapter[0]}"] if adapter is not None else []
    return [*words, *(word for name, value in (engine | dict(options)).items() for word in _option(name, value))]


def _option(name: str, value: object) -> Iterator[str]:
    """An option of vLLM's EngineArgs on its command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif value is not None:
        yield f"--{flag}"
        yield json.dumps(value) if isinstance(value, dict | list) else str(value)


def server_environment() -> dict[str, str]:
    """That of vLLM's server, which has a process of its own for the engine."""
    found = environment()
    found.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    found.pop("PYTHONUNBUFFERED", None)
    return {**found, **FORCED, "PYTHONUNBUFFERED": "1"}


def _tokens(event: dict[str, Any]) -> list[int]:
    found: list[int] = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    return found
