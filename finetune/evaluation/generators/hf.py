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
from finetune.data.prompts import answer_is_complete, prompt_dialect
from finetune.evaluation.generators.base import Answer, Done, Sampling
from finetune.evaluation.generators.stopping import EndOfAnswers
from finetune.models.adapter import is_sealed
from finetune.models.device import Device, choose_device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.models.positions import positions
from finetune.runtime.console import say
from finetune.tokens import added_after, decode_answer, encode_prompts, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HfGenerator:
    """transformers' own `generate`: see `Generator`."""

    name = "hf"
    version = str(transformers.__version__)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        device = choose_device(config.model.torch_dtype)
        return {
            "device": device.place.type,
            "dtype": device.dtype_name,
            "dequantize": config.evaluation.dequantize,
            "adapter": "apart",
        }

    def load(self, config: RunConfig, adapter: Path | None) -> HfModel:
        device = choose_device(config.model.torch_dtype)
        model: Any = load_base(config.model, config.quantization, device, dequantize=config.evaluation.dequantize)
        tokenizer = load_tokenizer(config.model)
        if adapter is not None:
            model = load_adapter(model, adapter, config.lora, config.model)
            if not is_sealed(adapter) and (end := added_after(tokenizer)):
                say(f"{adapter}: was trained with {end} before each answer, by an earlier version; train again")
        return HfModel(model, tokenizer, device)


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
        sampling: Sampling | None = None,
        done: Done | None = None,
        description: str = "generate",
        progress: bool = True,
    ) -> list[Answer]:
        assert sampling is None, "TODO helper B"
        model = self._model
        has_adapter = hasattr(model, "disable_adapter") and hasattr(model, "peft_config")
        with model.disable_adapter() if has_adapter and not tuned else nullcontext():
            answers = generate_answers(
                model,
                self._tokenizer,
                prompts,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                done=done,
                description=description,
                progress=progress,
            )
        return [Answer(*answer) for answer in answers]


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    done: Done | None = None,
    description: str = "generate",
    progress: bool = True,
) -> list[Answer]:
    """The answer to every prompt, in the prompts' order; `done` is told of each as it comes.

    Prompts of similar length share a batch, longest first. A prompt that leaves less than `max_new_tokens` of the model's
    positions is asked alone, with the room that there is. If memory does not suffice for a batch, it is asked in halves.
    """
    encoded = encode_prompts(tokenizer, prompts)
    limit = positions(model)
    answers = [Answer("", 0, "too_long", len(ids)) for ids in encoded]
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids)) for ids in encoded]
    order = sorted((i for i in range(len(prompts)) if room[i] > 0), key=lambda i: -len(encoded[i]))
    whole = [i for i in order if room[i] == max_new_tokens]
    batches = [[i] for i in order if room[i] < max_new_tokens]
    batches += [whole[start : start + batch_size] for start in range(0, len(whole), batch_size)]
    model.eval()
    with tqdm(total=len(prompts), desc=description, unit="question", disable=not progress) as bar:
        bar.update(len(prompts) - len(order))
        for batch in batches:
            asked = [(encoded[i], prompt_dialect(prompts[i])) for i in batch]
            for i, answer in zip(batch, _in_halves(model, tokenizer, asked, room[batch[0]]), strict=True):
                cut = room[i] < max_new_tokens and answer.new_tokens == room[i]
                complete = not cut or answer_is_complete(answer.text, prompt_dialect(prompts[i]))
                answers[i] = answer if complete or answer.problem else answer._replace(problem="too_long")
                if done:
                    done(i, answers[i])
            bar.update(len(batch))
    return answers


def _in_halves(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[list[int], str]], max_new_tokens: int
) -> list[Answer]:
    """The answers of one batch of (token ids, dialect), in as few parts as memory allows."""
    try:
        return _batch(model, tokenizer, asked, max_new_tokens)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():  # after the except clause, whose traceback keeps the tensors
        torch.cuda.empty_cache()
    tokens = max(len(ids) for ids, _ in asked)
    if len(asked) == 1:
        say(f"out of memory with a prompt of {tokens} tokens alone; it counts as out_of_memory")
        return [Answer("", 0, "out_of_memory", tokens)]
    say(f"out of memory with prompts of up to {tokens} tokens, {len(asked)} at once: asking them in two parts")
    middle = len(asked) // 2
    return [
        answer
        for part in (asked[:middle], asked[middle:])
        for answer in _in_halves(model, tokenizer, part, max_new_tokens)
    ]


def _batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[list[int], str]], max_new_tokens: int
) -> list[Answer]:
    ends = stop_ids(tokenizer, model)
    batch = tokenizer.pad({"input_ids": [ids for ids, _ in asked]}, return_tensors="pt").to(model.device)
    new = _greedy(model, tokenizer, batch, max_new_tokens, ends, [dialect for _, dialect in asked])
    kept = [_until_end(ids.tolist(), ends, tokenizer.pad_token_id) for ids in new]
    return [
        Answer(decode_answer(tokenizer, ids), len(ids), None, len(prompt))
        for ids, (prompt, _) in zip(kept, asked, strict=True)
    ]


class AnswersComplete(StoppingCriteria):
    """Ends each row of a batch as soon as its answer is complete. dialects: of each row."""

    def __init__(self, common: EndOfAnswers, dialects: Sequence[str]) -> None:
        self._rows = [common.answer(dialect) for dialect in dialects]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.complete:
                row.add(token)
        complete = [row.complete for row in self._rows]
        return torch.tensor(complete, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU, or on a CPU that of the machine, did not suffice."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)


@torch.inference_mode()
def _greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: Any,
    max_new_tokens: int,
    ends: list[int],
    dialects: Sequence[str],
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
        stopping_criteria=StoppingCriteriaList([AnswersComplete(EndOfAnswers(tokenizer, ends), dialects)]),
    )
    return output[:, width:]


def _until_end(ids: list[int], ends: list[int], padding: Any) -> list[int]:
    """The tokens of the answer: up to the first that ends one, and without the padding of rows that ended early."""
    ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
    while ids and ids[-1] == padding:
        ids.pop()
    return ids
