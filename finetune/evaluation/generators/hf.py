"""Greedy decoding with transformers, in batches: the same code for the base model, the tuned model and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune.config.schema import RunConfig
from finetune.data.prompts import answer_is_complete
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.models.device import Device, choose_device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.tokens import decode_answer, encode_prompts, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAY_END_AN_ANSWER = frozenset(";#`\n")


class HfGenerator:
    """transformers' own `generate`: see `Generator`."""

    name = "hf"
    version = str(transformers.__version__)

    def load(self, config: RunConfig, adapter: Path | None) -> HfModel:
        device = choose_device(config.model.torch_dtype)
        model: Any = load_base(config.model, config.quantization, device, dequantize=config.evaluation.dequantize)
        tokenizer = load_tokenizer(config.model)
        return HfModel(model if adapter is None else load_adapter(model, adapter), tokenizer, device)


class HfModel:
    """A transformers model, possibly with PEFT adapters, and its tokenizer: see `LoadedModel`."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, device: Device) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.dtype_name = device.dtype_name

    def answers(
        self,
        prompts: Sequence[str],
        *,
        tuned: bool,
        batch_size: int,
        max_new_tokens: int,
        description: str = "generate",
        progress: bool = True,
    ) -> list[Answer]:
        model = self._model
        has_adapter = hasattr(model, "disable_adapter") and hasattr(model, "peft_config")
        with model.disable_adapter() if has_adapter and not tuned else nullcontext():
            answers = generate_answers(
                model,
                self._tokenizer,
                prompts,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                description=description,
                progress=progress,
            )
        return [Answer(*answer) for answer in answers]


class AnswersComplete(StoppingCriteria):
    """Ends each row of a batch as soon as no further token could change the SQL in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._complete: list[bool] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        if not self._complete:
            self._complete = [False] * input_ids.shape[0]
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        for row, token in enumerate(last):
            if not self._complete[row] and _MAY_END_AN_ANSWER & set(token):
                self._complete[row] = answer_is_complete(
                    decode_answer(self._tokenizer, input_ids[row, self._prompt_tokens :].tolist())
                )
        return torch.tensor(self._complete, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    description: str = "generate",
    progress: bool = True,
) -> list[tuple[str, int]]:
    """(answer, number of new tokens without the end-of-text token) for every prompt, in the prompts' order.

    Prompts of similar length share a batch, longest first, so that if GPU memory does not suffice, the UserError comes with
    the first batch.
    """
    encoded = encode_prompts(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    ends = stop_ids(tokenizer, model)
    answers: list[tuple[str, int]] = [("", 0)] * len(prompts)
    model.eval()
    with tqdm(total=len(prompts), desc=description, unit="question", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt").to(model.device)
            try:
                new = _greedy(model, tokenizer, batch, max_new_tokens, ends)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of GPU memory with prompts of up to {len(encoded[chosen[0]])} tokens, {len(chosen)} at once; "
                    "lower evaluation.batch_size",
                    code="gpu.out_of_memory",
                ) from error
            for i, ids in zip(chosen, new, strict=True):
                kept = _until_end(ids.tolist(), ends, tokenizer.pad_token_id)
                answers[i] = (decode_answer(tokenizer, kept), len(kept))
            bar.update(len(chosen))
    return answers


@torch.inference_mode()
def _greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Any, max_new_tokens: int, ends: list[int]
) -> torch.Tensor:
    """New token ids, shape (rows, at most max_new_tokens). ends: the tokens that end an answer."""
    width = batch["input_ids"].shape[1]
    output: torch.Tensor = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([AnswersComplete(tokenizer, width)]),
    )
    return output[:, width:]


def _until_end(ids: list[int], ends: list[int], padding: Any) -> list[int]:
    """The tokens of the answer: up to the first that ends one, and without the padding of rows that ended early."""
    ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
    while ids and ids[-1] == padding:
        ids.pop()
    return ids
