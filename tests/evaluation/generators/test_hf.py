"""Greedy answers come in the prompts' order, do not depend on padding, and end once the SQL is complete."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.evaluation.generators import decoding, hf
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.hf import generate_answers
from finetune.models.device import Device
from finetune.models.load import load_base, load_tokenizer
from finetune.tokens import encode_examples

PROMPTS = [
    "How many items?",
    "List the names of all items dearer than 12, the dearest first. " * 6,
    "Which item has number 3?",
    "",
    "SELECT name FROM item WHERE id = 5 " * 3,
    "Which item has number 30, and how many items cost more than 7 euros?",
    "a",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelSection(name=str(tiny_model)))


@pytest.fixture(params=["refilled", "static"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test with this fixture runs with each way of decoding."""
    name: str = request.param
    if name == "static":
        monkeypatch.setattr(hf, "longest_text", lambda _: 0)
    return name


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "longest_text", lambda _: 0)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny random model in float32, not quantised."""
    device = Device(torch.device("cpu"), torch.float32)
    return load_base(ModelSection(name=str(tiny_model)), QuantizationSection(load_in_4bit=False), device)


def ask(model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 3, tokens: int = 12) -> list[tuple[str, int]]:
    answers = generate_answers(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=tokens, progress=False
    )  # fmt: skip
    return [(answer.text, answer.new_tokens) for answer in answers]


# the order of answers


class Echo:
    """A fake model that answers with the last words of its prompt and records the batches it was given."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.batches.append(SimpleNamespace(ids=input_ids, mask=attention_mask, settings=settings))
        return torch.cat([input_ids, input_ids[:, -settings["max_new_tokens"] :]], dim=1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_answers_come_in_the_order_of_the_prompts(tokenizer: Any, batch_size: int) -> None:
    prompts = [f"number {number} {'very ' * (number * 7 % 5)}long {number}" for number in range(8)]
    answers = ask(Echo(), tokenizer, prompts, batch_size, tokens=3)
    expected = [tokenizer.decode(tokenizer(prompt)["input_ids"][-3:]) for prompt in prompts]
    assert answers == [(text, 3) for text in expected]


def test_batches_are_full_longest_first_and_padded_on_the_left(tokenizer: Any) -> None:
    echo = Echo()
    ask(echo, tokenizer, PROMPTS, batch_size=3)
    assert [len(batch.ids) for batch in echo.batches] == [3, 3, 1]
    lengths = [length for batch in echo.batches for length in batch.mask.sum(dim=1).tolist()]
    assert lengths == sorted((len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS), reverse=True)
    for batch in echo.batches:
        assert batch.mask[:, -1].all()
        assert torch.equal(batch.mask == 0, batch.ids == tokenizer.pad_token_id)


def test_no_prompts_have_no_answers(tokenizer: Any) -> None:
    assert ask(Echo(), tokenizer, []) == []


def test_decoding_is_greedy_whatever_the_model_folder_says(way: str, model: Any, tokenizer: Any) -> None:
    before = ask(model, tokenizer, PROMPTS)
    given = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 3, "top_p": 0.5, "top_k": 2}
    kept = {name: getattr(model.generation_config, name) for name in given}
    try:
        for name, value in given.items():
            setattr(model.generation_config, name, value)
        assert ask(model, tokenizer, PROMPTS) == before
    finally:
        for name, value in kept.items():
            setattr(model.generation_config, name, value)


# padding


def ids_of(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, batch_size: int) -> list[list[int]]:
    """The exact token ids of the answers to PROMPTS, in their order."""
    marks: dict[str, list[int]] = {}

    def decode(ids: list[int], **_: Any) -> str:
        marks[str(len(marks))] = list(ids)
        return str(len(marks) - 1)

    with monkeypatch.context() as patch:
        patch.setattr("finetune.evaluation.generators.static.AnswersComplete", NeverComplete)
        patch.setattr(tokenizer, "decode", decode)
        answers = ask(model, tokenizer, PROMPTS, batch_size, tokens=24)
    return [marks[text] for text, _ in answers]


class NeverComplete:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_a_batch_of_one_and_a_batch_of_many_give_the_same_tokens(
    static: None, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, batch_size: int
) -> None:
    alone = ids_of(monkeypatch, model, tokenizer, 1)
    assert ids_of(monkeypatch, model, tokenizer, batch_size) == alone
    assert len({tuple(ids) for ids in alone}) > 3, "answers that do not depend on the prompt prove nothing"


# the end of an answer


@pytest.fixture
def scripted(way: str, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> Any:
    """scripted([(prompt, answer tokens), ...]): makes the model answer so; prompts must be asked in this order."""
    counts = SimpleNamespace(passes=0)
    forward = model.forward

    def play(script: list[tuple[str, list[int]]]) -> Any:
        start = {tuple(tokenizer(prompt)["input_ids"]): ids for prompt, ids in script}
        rows: list[list[int]] = []
        counts.passes = 0

        def choose(logits: torch.Tensor, temperature: Any, seeds: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            """A greedy answer's seed is the number of its prompt."""
            counts.passes += 1
            texts = [script[number][1] for number in seeds.tolist()]
            return torch.tensor([ids[min(n, len(ids) - 1)] for ids, n in zip(texts, drawn.tolist(), strict=True)])

        def speak(*args: Any, **kwargs: Any) -> Any:
            if not rows:
                for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
                    rows.append(start[tuple(i for i, real in zip(ids, mask, strict=True) if real)])
            output = forward(*args, **kwargs)
            for row, answer in enumerate(rows):
                output.logits[row, -1, answer[min(counts.passes, len(answer) - 1)]] = 1e9
            counts.passes += 1
            return output

        if way == "static":
            monkeypatch.setattr(model, "forward", speak)
        monkeypatch.setattr(decoding, "chosen", choose)
        return counts

    return play


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_each_answer_ends_at_its_own_end(scripted: Any, model: Any, tokenizer: Any) -> None:
    name, more = encoded(tokenizer, "SELECT name FROM item"), encoded(tokenizer, " WHERE id = 1")
    semicolon, gap, prose = (encoded(tokenizer, text) for text in (";", "\n\n", "name of each item in the shop"))
    cut_off = (name + 20 * more)[:20]
    script = [
        ("ended by the end-of-text token", [*name, tokenizer.eos_token_id, *more]),
        ("ended by a semicolon", [*name, *more, *semicolon, *more]),
        ("ended by a blank line and a word that no query goes on with", [*name, *gap, *prose]),
        ("ended by nothing", cut_off),
    ]
    counts = scripted(script)
    answers = ask(model, tokenizer, [prompt for prompt, _ in script], batch_size=4, tokens=20)
    assert answers == [
        ("SELECT name FROM item", len(name)),  # the end-of-text token does not count
        ("SELECT name FROM item WHERE id = 1;", len(name + more + semicolon)),
        ("SELECT name FROM item\n\nnam", len(name + gap + encoded(tokenizer, "nam"))),
        (tokenizer.decode(cut_off), 20),
    ]
    assert 20 <= counts.passes <= 23, "one for each token, and more only for prompts of other lengths"


def test_generation_stops_once_every_answer_is_complete(scripted: Any, model: Any, tokenizer: Any) -> None:
    short, long = encoded(tokenizer, "SELECT 1;"), encoded(tokenizer, "SELECT name FROM item;")
    counts = scripted([("one", [*short, *long]), ("two", [*long, *long])])
    answers = ask(model, tokenizer, ["one", "two"], batch_size=2, tokens=200)
    assert answers == [("SELECT 1;", len(short)), ("SELECT name FROM item;", len(long))]
    assert counts.passes == len(long)


def test_the_end_of_text_token_ends_generation(scripted: Any, model: Any, tokenizer: Any) -> None:
    name = encoded(tokenizer, "SELECT name FROM item")
    counts = scripted([("one", [*name, tokenizer.eos_token_id, *name])])
    assert ask(model, tokenizer, ["one"], tokens=200) == [("SELECT name FROM item", len(name))]
    assert counts.passes == len(name) + 1


def test_any_end_token_of_the_model_ends_an_answer(
    monkeypatch: pytest.MonkeyPatch, scripted: Any, model: Any, tokenizer: Any
) -> None:
    """Such as the end of a turn beside the end of the text: Llama 3 and Qwen have both."""
    name = encoded(tokenizer, "SELECT name FROM item")
    turn = encoded(tokenizer, "?")[-1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, turn])
    counts = scripted([("one", [*name, turn, *name]), ("two", [*name[:2], tokenizer.eos_token_id, *name])])
    answers = ask(model, tokenizer, ["one", "two"], tokens=200)
    assert answers == [("SELECT name FROM item", len(name)), (tokenizer.decode(name[:2]), 2)]
    assert counts.passes == len(name) + 1


def test_the_name_of_a_control_token_in_an_answer_is_text(scripted: Any, model: Any, tokenizer: Any) -> None:
    sql = "SELECT id FROM item WHERE name = '</s>'"
    [example] = encode_examples(tokenizer, ["tag"], [sql])
    scripted([("tag", example.ids[example.answer_start :])])
    assert ask(model, tokenizer, ["tag"], tokens=200)[0][0] == sql


def test_a_semicolon_in_quotes_ends_nothing(scripted: Any, model: Any, tokenizer: Any) -> None:
    sql = "SELECT id FROM item WHERE name = 'a;b'"
    scripted([("quotes", [*encoded(tokenizer, sql), tokenizer.eos_token_id])])
    assert ask(model, tokenizer, ["quotes"], tokens=200)[0][0] == sql


def test_a_tokenizer_that_pads_with_its_end_of_text_token_loses_no_token(
    scripted: Any, model: Any, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    tokenizer.pad_token = tokenizer.eos_token
    name = encoded(tokenizer, "SELECT name FROM item")
    scripted([("a short one", [*name[:2], tokenizer.eos_token_id]), ("one", [*name, tokenizer.eos_token_id])])
    answers = ask(model, tokenizer, ["a short one", "one"], batch_size=2)
    assert answers == [(tokenizer.decode(name[:2]), 2), ("SELECT name FROM item", len(name))]


def ask_in_full(model: Any, tokenizer: Any, prompts: list[str], tokens: int = 12) -> list[Answer]:
    return generate_answers(model, tokenizer, prompts, batch_size=4, max_new_tokens=tokens, progress=False)


def test_a_batch_for_which_memory_does_not_suffice_is_asked_in_parts(
    static: None, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [ask_in_full(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    generate = model.generate

    def limited(**given: Any) -> Any:
        if given["input_ids"].numel() > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")
        return generate(**given)

    monkeypatch.setattr(model, "generate", limited)
    answers = ask_in_full(model, tokenizer, PROMPTS)
    longest = max(range(len(PROMPTS)), key=lambda i: len(tokenizer(PROMPTS[i])["input_ids"]))
    for number, (answer, alone) in enumerate(zip(answers, expected, strict=True)):
        assert answer.problem == ("out_of_memory" if number == longest else None)
        assert answer.prompt_tokens == alone.prompt_tokens
        assert (answer.text == alone.text) is (number != longest)
    assert "asking them in two parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_of_a_cpu_runs_out_as_that_of_a_gpu(
    static: None, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, error: Exception
) -> None:
    def full(**_: Any) -> None:
        raise error

    monkeypatch.setattr(model, "generate", full)
    assert {answer.problem for answer in ask_in_full(model, tokenizer, PROMPTS)} == {"out_of_memory"}


def test_another_error_is_not_taken_for_missing_memory(
    static: None, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        ask_in_full(model, tokenizer, PROMPTS)


# the model's positions


def test_a_prompt_beyond_the_models_positions_is_too_long_and_the_others_are_answered(
    way: str, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any
) -> None:
    expected = ask_in_full(model, tokenizer, PROMPTS)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    limit = max(lengths)
    monkeypatch.setattr(model.config, "max_position_embeddings", limit)
    answers = ask_in_full(model, tokenizer, PROMPTS)
    assert [answer.prompt_tokens for answer in answers] == lengths
    for answer, before, length in zip(answers, expected, lengths, strict=True):
        if length == limit:
            assert answer == Answer("", 0, "too_long", length)
        elif length + 12 <= limit:
            assert answer == before


def test_an_answer_for_which_no_room_is_left_is_too_long_but_a_whole_one_counts(
    monkeypatch: pytest.MonkeyPatch, scripted: Any, model: Any, tokenizer: Any
) -> None:
    name, whole = encoded(tokenizer, "SELECT name FROM item"), encoded(tokenizer, "SELECT 1;")
    room = len(whole)
    assert len(name) > room
    for ids, problem in ((name, "too_long"), (whole, None)):
        with monkeypatch.context() as patch:
            patch.setattr(model.config, "max_position_embeddings", len(tokenizer("one")["input_ids"]) + room)
            patch.setattr(model, "forward", model.forward)
            scripted([("one", [*ids, *ids])])
            (answer,) = ask_in_full(model, tokenizer, ["one"], tokens=200)
        assert (answer.problem, answer.new_tokens) == (problem, room)
