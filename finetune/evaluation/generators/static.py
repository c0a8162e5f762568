"""Decoding in static batches with transformers' own `generate`, for models that decoding.py does not serve: those with sliding
windows shorter than their texts, recurrent or hybrid layers, or an attention of their own. A batch waits for its slowest row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from finetune.evaluation.generators.asked import Asked, Finished, is_out_of_memory
from finetune.evaluation.generators.sampling import noisy
from finetune.evaluation.generators.stopping import EndOfAnswers
from finetune.runtime.console import say
from finetune.tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_in_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float | None,
    finished: Finished,
) -> None:
    """Prompts of similar length share a batch, longest first; one with less room than `max_new_tokens` is asked alone. If memory
    does not suffice for a batch, it is asked in halves."""
    order = sorted(asked, key=lambda one: -len(one.ids))
    whole = [one for one in order if one.room == max_new_tokens]
    batches = [[one] for one in order if one.room < max_new_tokens]
    batches += [whole[start : start + batch_size] for start in range(0, len(whole), batch_size)]
    for batch in batches:
        _in_halves(model, tokenizer, batch, temperature, finished)


def _in_halves(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Asked], temperature: float | None, finished: Finished
) -> None:
    """Answers one batch, in as few parts as memory allows."""
    answers: list[list[int]] | None = None
    try:
        answers = _batch(model, tokenizer, asked, temperature)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
    if answers is not None:
        for one, ids in zip(asked, answers, strict=True):
            finished(one, ids, None)
        return
    if torch.cuda.is_available():  # after the except clause, whose traceback keeps the tensors
        torch.cuda.empty_cache()
    tokens = max(len(one.ids) for one in asked)
    if len(asked) == 1:
        say(f"out of memory with a prompt of {tokens} tokens alone; it counts as out_of_memory")
        finished(asked[0], [], "out_of_memory")
        return
    say(f"out of memory with prompts of up to {tokens} tokens, {len(asked)} at once: asking them in two parts")
    middle = len(asked) // 2
    for part in (asked[:middle], asked[middle:]):
        _in_halves(model, tokenizer, part, temperature, finished)


@torch.inference_mode()
def _batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Asked], temperature: float | None
) -> list[list[int]]:
    ends = stop_ids(tokenizer, model)
    batch = tokenizer.pad({"input_ids": [one.ids for one in asked]}, return_tensors="pt").to(model.device)
    width = batch["input_ids"].shape[1]
    drawing = [] if temperature is None else [_Noise(temperature, [one.seed for one in asked], width)]
    complete = AnswersComplete(EndOfAnswers(tokenizer, ends), [one.dialect for one in asked])
    output: Tensor = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        max_new_tokens=asked[0].room,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList(drawing),
        stopping_criteria=StoppingCriteriaList([complete]),
    )
    return [_until_end(ids.tolist(), ends, tokenizer.pad_token_id) for ids in output[:, width:]]


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


class _Noise(LogitsProcessor):
    """The random draws of sampling.py. seeds: of each row. width: tokens of the padded prompts."""

    def __init__(self, temperature: float, seeds: Sequence[int], width: int) -> None:
        self._temperature, self._seeds, self._width = temperature, torch.tensor(seeds), width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        seeds = self._seeds.to(scores.device)
        drawn = torch.full_like(seeds, input_ids.shape[1] - self._width)
        return noisy(scores, self._temperature, seeds, drawn)  # type: ignore[return-value]


def _until_end(ids: list[int], ends: list[int], padding: Any) -> list[int]:
    """The tokens of the answer: up to the first that ends one, and without the padding of rows that ended early."""
    ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
    while ids and ids[-1] == padding:
        ids.pop()
    return ids
