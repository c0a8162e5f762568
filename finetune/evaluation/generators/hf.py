"""Decoding with transformers: the same code for the base model, the tuned model and `generate`.

decoding.py refills rows whose answers have ended; static.py serves the models that it cannot. How the weights are held
(dequantized or not, the adapter merged or apart) is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from tqdm import tqdm

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.asked import Asked, asked_of
from finetune.evaluation.generators.base import Answer, Done, Problem, Sampling
from finetune.evaluation.generators.decoding import Decoder
from finetune.evaluation.generators.passes import longest_configured, longest_text
from finetune.evaluation.generators.static import answer_in_batches
from finetune.evaluation.generators.weights import Weights, dtype_settings, weights_for
from finetune.models.adapter import is_sealed
from finetune.models.answering import answering_device
from finetune.models.casts import adapters_to_dtype
from finetune.models.device import Device
from finetune.models.load import (
    load_adapter,
    load_base,
    load_model_config,
    load_tokenizer,
    merge_adapter,
)
from finetune.models.positions import positions
from finetune.runtime.console import say
from finetune.tokens import added_after, decode_answer, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HfGenerator:
    """transformers' models, with a decoding loop of ours: see `Generator`."""

    name = "hf"
    version = str(transformers.__version__)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        device = answering_device(config)
        weights = weights_for(config, device)
        refilled = longest_configured(load_model_config(config.model)) > 0
        return {
            "device": device.place.type,
            **dtype_settings(device),
            "dequantize": weights.dequantize,
            "adapter": "merged" if weights.merged else "apart",
            "batches": "refilled" if refilled else "static",
        }

    def load(self, config: RunConfig, adapter: Path | None) -> HfModel:
        device = answering_device(config)
        weights = weights_for(config, device)
        tokenizer = load_tokenizer(config.model)
        if adapter is not None and not is_sealed(adapter) and (end := added_after(tokenizer)):
            say(f"{adapter}: was trained with {end} before each answer, by an earlier version; train again")

        def load() -> Any:
            model: Any = load_base(config.model, config.quantization, device, dequantize=weights.dequantize)
            return model if adapter is None else load_adapter(model, adapter, config.lora, config.model)

        began = time.monotonic()
        model = load()
        return HfModel(model, tokenizer, device, weights, load, load_seconds=time.monotonic() - began)


class HfModel:
    """A transformers model, possibly with PEFT adapters, and its tokenizer: see `LoadedModel`.

    weights: how the tuned model is held; apart if left out. reload: gives the model again as it was, for answers of the base
    model after the adapter was merged. load_seconds: measured, with merging.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        device: Device,
        weights: Weights | None = None,
        reload: Callable[[], Any] | None = None,
        *,
        load_seconds: float = 0.0,
    ) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self._merges = weights is not None and weights.merged and reload is not None
        self._reload, self._merged = reload, False
        self.dtype_name = device.dtype_name
        self.load_seconds = load_seconds

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
        began = time.monotonic()
        model = self._tuned() if tuned else self._base()
        self.load_seconds += time.monotonic() - began
        with model.disable_adapter() if _has_adapter(model) and not tuned else nullcontext():
            answers = generate_answers(
                model,
                self._tokenizer,
                prompts,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                done=done,
                description=description,
                progress=progress,
            )
        return [Answer(*answer) for answer in answers]

    def _tuned(self) -> Any:
        if _has_adapter(self._model):
            if self._merges:
                self._model, self._merged = merge_adapter(self._model), True
            else:
                adapters_to_dtype(self._model, self._device.dtype)
        return self._model

    def _base(self) -> Any:
        """Loads the model again if the adapter was merged: subtracting it would leave a rounding error in the weights."""
        if self._merged:
            assert self._reload is not None
            self._model = None  # before the other is loaded
            self._model, self._merged = self._reload(), False
        return self._model


def _has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    done: Done | None = None,
    description: str = "generate",
    progress: bool = True,
) -> list[Answer]:
    """The answer to every prompt, in the prompts' order; `done` is told of each as it comes.

    batch_size: prompts answered at once. A prompt that leaves less than `max_new_tokens` of the model's positions is asked with
    the room that there is.
    """
    asked, answers = asked_of(
        prompts,
        encode_prompts(tokenizer, prompts),
        positions=positions(model),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    with tqdm(total=len(prompts), desc=description, unit="question", disable=not progress) as bar:

        def tell(number: int) -> None:
            bar.update()
            if done:
                done(number, answers[number])

        def finished(one: Asked, ids: list[int], problem: Problem | None) -> None:
            text = "" if problem else decode_answer(tokenizer, ids)
            answers[one.number] = one.answer(text, len(ids), problem)
            tell(one.number)

        for number in set(range(len(prompts))) - {one.number for one in asked}:
            tell(number)
        model.eval()
        temperature = sampling.temperature if sampling else None
        longest = longest_text(model) if asked else 0
        refilled = [one for one in asked if one.total <= longest]
        if refilled:
            Decoder(model, tokenizer, min(batch_size, len(refilled)), temperature, finished).answer(refilled)
        if others := [one for one in asked if one.total > longest]:
            answer_in_batches(
                model,
                tokenizer,
                others,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                finished=finished,
            )
    return answers
