"""Answers with vLLM, on GPUs of compute capability 7.5 and up: see `Generator`.

vLLM runs in a process and an environment of its own (vllm_process.py, vllm_place.py). It is handed token ids, and the weights
that hf would compute with (vllm_weights.py). It is loaded once, at the first question: then the tuned model's weights replace the
base model's in place (or, with evaluation.adapter=apart, the adapter is computed beside them).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.asked import asked_of
from finetune.evaluation.generators.base import Answer, Done, Sampling
from finetune.evaluation.generators.stopping import EndOfAnswers, GrowingAnswer
from finetune.evaluation.generators.vllm_place import Place, engine_options, find_vllm, require_vllm
from finetune.evaluation.generators.vllm_process import VllmProcess
from finetune.models.positions import positions
from finetune.runtime.console import say
from finetune.tokens import encode_prompts

if TYPE_CHECKING:
    from finetune.evaluation.generators.vllm_weights import Weights

SLACK_TOKENS = 1024
"""By which later prompts may be longer than those of the first call, before vLLM has to be loaded again."""
LENGTH_STEP = 256


class VllmGenerator:
    """vLLM: see `Generator`."""

    name = "vllm"

    @property
    def version(self) -> str:
        found = find_vllm()
        return found.version if found else "missing"

    def settings(self, config: RunConfig) -> dict[str, Any]:
        from finetune.evaluation.generators.weights import dtype_settings
        from finetune.models.answering import answering_device

        device = answering_device(config)
        dtypes, options = dtype_settings(device), engine_options()
        return {
            "device": device.place.type,
            **dtypes,
            "dequantize": config.quantization.load_in_4bit,  # vLLM computes with weights of 16 bits or more
            "adapter": _applied(config),
            **({"float32_products": "ieee"} if dtypes["dtype"] == "float32" else {}),  # TF32 in earlier versions
            **({"engine": options} if options else {}),
        }

    def load(self, config: RunConfig, adapter: Path | None) -> VllmModel:
        """Raises UserError also where vLLM cannot run. The weights are loaded with the first question."""
        from finetune.evaluation.generators.vllm_weights import Weights
        from finetune.models.adapter import check_base, check_folder, check_run
        from finetune.models.answering import answering_device
        from finetune.models.load import load_tokenizer
        from finetune.models.source import identity_of_base

        found = require_vllm(config)
        rank = 0
        if adapter is not None:
            settings = check_folder(adapter)
            check_run(adapter, settings, config.lora)
            check_base(adapter, identity_of_base(config.model))
            rank = settings["r"]
        device = answering_device(config)
        return VllmModel(found, config, load_tokenizer(config.model), Weights(config, adapter, device), device.dtype_name,
                         adapter=adapter, rank=rank)  # fmt: skip


class VllmModel:
    """A model in a process of vLLM: see `LoadedModel`. load_seconds: that writing and loading weights has taken so far."""

    def __init__(
        self,
        where: Place,
        config: RunConfig,
        tokenizer: Any,
        weights: Weights,
        dtype_name: str,
        *,
        adapter: Path | None,
        rank: int,
    ) -> None:
        self._place, self._config, self._tokenizer, self._weights = where, config, tokenizer, weights
        self.dtype_name = dtype_name
        self.load_seconds = 0.0
        self._adapter, self._rank = adapter, rank
        self._apart = _applied(config) == "apart" and adapter is not None
        from finetune.models.end_tokens import end_tokens
        from finetune.models.load import load_model_config

        model_config = load_model_config(config.model)
        self._ends = end_tokens(config.model, tokenizer, model_config)
        self._common = EndOfAnswers(tokenizer, self._ends)
        self._positions = positions(model_config)
        self._process: VllmProcess | None = None
        self._length = 0  # tokens of prompt and answer that the engine was started for
        self._tuned = False  # whether the tuned weights are loaded
        self._end = weakref.finalize(self, _end, None, weights)

    def answers(
        self,
        prompts: Sequence[str],
        *,
        tuned: bool,
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        done: Done | None = None,
        description: str = "generate",
        progress: bool = True,
    ) -> list[Answer]:
        """See `LoadedModel`; vLLM schedules by itself, whatever the batch size. Raises UserError if vLLM fails, TransientError if
        its process is killed. Whatever is raised, its process has ended."""
        tuned = tuned and self._adapter is not None
        encoded = encode_prompts(self._tokenizer, prompts)
        asked, answers = asked_of(
            prompts, encoded, positions=self._positions, max_new_tokens=max_new_tokens, sampling=sampling
        )
        if done:
            for number in set(range(len(prompts))) - {one.number for one in asked}:
                done(number, answers[number])
        if not asked:
            return answers
        growing = {place: self._common.answer(one.dialect) for place, one in enumerate(asked)}
        try:
            process = self._ready(max(one.total for one in asked), tuned)
            replies = process.tokens(
                prompts=[one.ids for one in asked],
                most=[one.room for one in asked],
                temperature=sampling.temperature if sampling else 0.0,
                seeds=[one.seed for one in asked] if sampling else None,
                lora=tuned and self._apart,
            )
            with tqdm(total=len(prompts), desc=description, unit="question", disable=not progress) as bar:
                bar.update(len(prompts) - len(asked))
                for reply in replies:
                    for place in _complete(reply, growing, process):
                        one, tokens = asked[place], growing.pop(place)
                        answer = answers[one.number] = one.answer(tokens.text, len(tokens.ids))
                        if done:
                            done(one.number, answer)
                        bar.update()
                    for name, why in reply["failed"].items():
                        one = asked[int(name)]
                        if growing.pop(int(name), None):
                            say(
                                f"vLLM gave no answer to a prompt of {len(one.ids)} tokens, which counts as failed: {why}"
                            )
                            answers[one.number] = one.answer("", 0, "failed")
                            if done:
                                done(one.number, answers[one.number])
        except BaseException as error:
            self._stop(failed=isinstance(error, Exception))
            raise
        assert not growing, f"vLLM gave no answer to {len(growing)} prompts"
        return answers

    def _ready(self, length: int, tuned: bool) -> VllmProcess:
        """The process, with the weights and the room for prompts and answers that are asked for."""
        started = time.monotonic()
        wanted = tuned and not self._apart
        try:
            if self._process is not None and length > self._length:
                say(f"vLLM is loaded again, for prompts and answers of up to {length} tokens")
                self._stop(failed=False)
            if self._process is None:
                return self._start(length, wanted)
            if wanted != self._tuned:
                folder = self._weights.folder(tuned=wanted)
                self._process.loaded(do="weights", model=str(folder))
                self._weights.loaded(folder)
                self._tuned = wanted
            return self._process
        finally:
            self.load_seconds = round(self.load_seconds + time.monotonic() - started, 3)

    def _start(self, length: int, tuned: bool) -> VllmProcess:
        longest = -(-(length + SLACK_TOKENS) // LENGTH_STEP) * LENGTH_STEP
        self._length = longest if self._positions is None else min(longest, self._positions)
        say(f"loading vLLM {self._place.version}, which takes a minute or more; its log: {self._weights.log}")
        folder = self._weights.folder(tuned=tuned)
        self._process = VllmProcess(self._place.python, self._weights.log)
        self._end.detach()
        self._end = weakref.finalize(self, _end, self._process, self._weights)
        engine = {
            "dtype": self.dtype_name,
            "max_model_len": self._length,
            "seed": self._config.training.seed,
            "trust_remote_code": self._config.model.trust_remote_code,
            **engine_options(),
        }
        self._process.loaded(
            do="load",
            model=str(folder),
            ends=self._ends,
            lora={"folder": str(self._adapter), "rank": self._rank} if self._apart else None,
            engine=engine,
        )
        self._weights.loaded(folder)
        self._tuned = tuned
        return self._process

    def _stop(self, *, failed: bool) -> None:
        """failed: keep the log."""
        self._end.detach()
        if self._process is not None:
            self._process.stop()
            self._process = None
        self._weights.remove(log=not failed)


def _complete(reply: dict[str, Any], growing: Mapping[int, GrowingAnswer], process: VllmProcess) -> list[int]:
    """Add the tokens of a step. Returns the places of the answers that are complete; vLLM is told of those that it would
    continue. growing: by place, without those that were complete before."""
    complete: list[int] = []
    for place, token in zip(reply["at"], reply["new"], strict=True):
        answer = growing.get(place)  # None: it was complete some steps ago
        if answer is not None and not answer.complete and answer.add(token):
            complete.append(place)
    ended = set(reply["ended"])
    if early := [place for place in complete if place not in ended]:
        process.abort(early)
    return [place for place in dict.fromkeys([*complete, *reply["ended"]]) if place in growing]


def _end(process: VllmProcess | None, weights: Weights) -> None:
    if process is not None:
        process.stop()
    weights.remove(log=True)


def _applied(config: RunConfig) -> str:
    """How the adapter is applied: vLLM's weights have 16 bits or more, so it can always be merged into them, which is faster."""
    return "apart" if config.evaluation.adapter == "apart" else "merged"
