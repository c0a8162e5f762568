"""Answers of a GGUF file: those of transformers on the same weights, with the same end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.config.schema import ModelSection
from finetune.evaluation.generators.base import Answer, Sampling
from finetune.evaluation.generators.hf import HfModel
from finetune.evaluation.generators.llama_cpp import LlamaCppModel
from finetune.models.device import Device
from finetune.models.load import load_tokenizer
from finetune.tokens import stop_ids

pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")

PROMPTS = [f"### sqlite schema\nCREATE TABLE item (id INTEGER)\n### Question\nWhich {n}?\n### SQL\n" for n in range(9)]


def ask(model: object, prompts: list[str] = PROMPTS, **settings: object) -> list[Answer]:
    arguments = {"tuned": False, "batch_size": 4, "max_new_tokens": 12, "progress": False} | settings
    answers: list[Answer] = model.answers(prompts, **arguments)  # type: ignore[attr-defined]
    return answers


def test_the_answers_are_those_of_transformers(tiny_model: Path, tiny_gguf: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = ask(HfModel(model, tokenizer, Device(torch.device("cpu"), torch.float32)))
    told: dict[int, Answer] = {}
    with LlamaCppModel(tiny_gguf, tokenizer, stop_ids(tokenizer, model), limit=1024) as served:
        found = ask(served, done=told.__setitem__)
        assert found == expected and [told[n] for n in range(len(PROMPTS))] == found
        assert served.facts()["name"] == "llama_cpp"


def test_an_answer_ends_at_the_tokens_that_end_one(tiny_model: Path, tiny_gguf: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    with LlamaCppModel(tiny_gguf, tokenizer, [2]) as served:
        [whole] = ask(served, PROMPTS[:1])
    ids = tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    assert whole.new_tokens == 12
    with LlamaCppModel(tiny_gguf, tokenizer, [2, ids[3]]) as served:
        [cut] = ask(served, PROMPTS[:1])
    assert cut.new_tokens < 12 and whole.text.startswith(cut.text)


def test_a_prompt_without_room_is_too_long(tiny_model: Path, tiny_gguf: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    length = len(tokenizer(PROMPTS[0])["input_ids"])
    with LlamaCppModel(tiny_gguf, tokenizer, [2], limit=length) as served:
        assert ask(served, PROMPTS[:1]) == [Answer("", 0, "too_long", length)]
    with LlamaCppModel(tiny_gguf, tokenizer, [2], limit=length + 3) as served:
        [answer] = ask(served, PROMPTS[:1])
        assert (answer.problem, answer.new_tokens) == ("too_long", 3)


def test_sampled_answers_depend_on_their_seed(tiny_model: Path, tiny_gguf: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    with LlamaCppModel(tiny_gguf, tokenizer, [2]) as served:
        one, again, other = (
            [a.text for a in ask(served, PROMPTS[:3], sampling=Sampling(temperature=1.5, seeds=seeds), batch_size=1)]
            for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])
        )
    assert one == again and one != other
