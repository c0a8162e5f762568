"""Text becomes text tokens, the prompt is followed by the answer, and both come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

# ruff: noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.random_model import make_tokenizer
from finetune.models.load import load_tokenizer
from finetune.tokens import added_after, decode_answer, encode_examples, encode_prompts, stop_ids
from tests.helpers import tiny_architectures
from tests.helpers.errors import raises
from tests.helpers.model_examples import named

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>", "<eos>", "sop"]
CONTROL = [*SPECIAL, "[INST]", "<tool_call>"]
"""Also two that are added but not special."""
CORPUS = [
    "SELECT name FROM item WHERE tag = 'x' AND id <= 12",
    "How many </s> items [INST] of the <tool_call> shop?",
] * 20
ASCII = ["\n", *(chr(code) for code in range(32, 127))]
COMMON: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
PROMPT, ANSWER = "### Question\nHow many items?\n### SQL\n", "SELECT name FROM item WHERE tag = '{}'"


def trained(made: Tokenizer, trainer: Any) -> Tokenizer:
    made.train_from_iterator(CORPUS, trainer)
    return made


def bytes_bpe() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **COMMON))


def metaspace_bpe() -> Tokenizer:
    """As Llama 2 and Mistral."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(made, trainers.BpeTrainer(vocab_size=300, initial_alphabet=ASCII, **COMMON))


def unigram() -> Tokenizer:
    """As XLM-R and T5: its vocabulary itself has the control tokens, and finds them in any text."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(made, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", initial_alphabet=ASCII, **COMMON))


KINDS: dict[str, Callable[[], Tokenizer]] = {"bytes": bytes_bpe, "metaspace": metaspace_bpe, "unigram": unigram}
AROUND = {"<s> $A </s>": "<s>", "$A </s>": "", "<s> $A": "<s>", "<s> <s> $A": "<s>", "<s> $A </s> </s>": "<s>", "": ""}
"""Post-processors, and what is kept of them before a prompt."""


def tokenizer_of(kind: str, around: str = "", **settings: Any) -> Any:
    made = KINDS[kind]()
    made.add_tokens(
        [AddedToken("[INST]", normalized=False), AddedToken("<tool_call>", normalized=False), AddedToken("\n\n"), "  "]
    )
    if around:
        ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=["<|im_end|>", "<eos>"], **settings,
    )  # fmt: skip


def control_ids(tokenizer: Any, ids: list[int]) -> list[str]:
    return [name for name in tokenizer.convert_ids_to_tokens(ids) if name in CONTROL]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_no_end_token_stands_between_prompt_and_answer(kind: str, around: str) -> None:
    tokenizer = tokenizer_of(kind, around)
    answer = ANSWER.format("x")
    [example] = encode_examples(tokenizer, [PROMPT], [answer])
    [prompt] = encode_prompts(tokenizer, [PROMPT])
    assert example.ids[: example.answer_start] == prompt
    assert control_ids(tokenizer, example.ids) == [*([AROUND[around]] if AROUND[around] else []), "</s>"]
    assert example.ids[-1] == tokenizer.eos_token_id
    assert decode_answer(tokenizer, example.ids[example.answer_start :]) == answer
    assert added_after(tokenizer) == around.partition("$A")[2].strip()


def test_flags_and_stored_truncation_and_padding_change_nothing() -> None:
    plain, flagged = tokenizer_of("bytes", "<s> $A"), tokenizer_of("bytes", add_bos_token=True, add_eos_token=True)
    assert flagged("x")["input_ids"][-1] == flagged.eos_token_id
    expected = encode_prompts(plain, [PROMPT, "x"])
    assert encode_prompts(flagged, [PROMPT, "x"]) == expected
    flagged.backend_tokenizer.enable_truncation(4)
    flagged.backend_tokenizer.enable_padding(length=200, pad_id=3)
    assert encode_prompts(flagged, [PROMPT, "x"]) == expected
    assert control_ids(flagged, encode_prompts(flagged, ["tag = '</s>' " * 4])[0]) == ["<s>"]
    flagged.backend_tokenizer.post_processor = None  # also one that changes later
    assert encode_prompts(flagged, ["x"]) == [expected[1][1:]]


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_in_a_text_is_text(kind: str, name: str) -> None:
    tokenizer = tokenizer_of(kind, "<s> $A </s>")
    texts = [ANSWER.format(name), name, f"a{name}b", f"{name}{name}", f" {name} ", f"1 {name}\n\n  2"]
    assert all(control_ids(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    for text in texts:
        [example] = encode_examples(tokenizer, [PROMPT + text], [text])
        prompt, answer = example.ids[: example.answer_start], example.ids[example.answer_start : -1]
        assert control_ids(tokenizer, prompt) == ["<s>"]
        assert control_ids(tokenizer, answer) == []
        if kind == "bytes":
            assert decode_answer(tokenizer, answer) == text
    answer = encode_examples(tokenizer, [PROMPT], [ANSWER.format(name)])[0].ids
    assert decode_answer(tokenizer, answer[len(encode_prompts(tokenizer, [PROMPT])[0]) :]) == ANSWER.format(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_control_tokens_has_the_ids_it_always_had(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "<s> $A")
    texts = [PROMPT, ANSWER.format("x"), "  two  \n\n  lines", "", "naïve é ☃ < > [ ] </ s> [inst]"]
    assert encode_prompts(tokenizer, texts) == tokenizer(texts)["input_ids"]


def test_characters_without_a_token_stay_unknown_beside_a_control_token() -> None:
    tokenizer = tokenizer_of("unigram")
    [ids] = encode_prompts(tokenizer, ["☃ </s> <unk>"])
    assert control_ids(tokenizer, ids) == ["<unk>"], "the snowman, and neither of the two names"


def test_a_token_of_one_character_is_text_whatever_it_pads() -> None:
    tokenizer = tokenizer_of("bytes")
    tokenizer.pad_token = "!"
    assert encode_prompts(tokenizer, ["a != b"]) == [tokenizer("a != b")["input_ids"]]


def test_a_token_added_later_counts() -> None:
    tokenizer = tokenizer_of("bytes")
    before = encode_prompts(tokenizer, ["a <later> b"])
    tokenizer.add_tokens(["<later>"], special_tokens=True)
    assert encode_prompts(tokenizer, ["a <later> b"]) == before


def test_a_tokenizer_in_python() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    assert added_after(tokenizer) == "</s>"
    text = "SELECT '</s>' <pad> <extra_id_1> é"
    [example] = encode_examples(tokenizer, [text], [text])
    assert example.ids == [*(byte + 3 for byte in text.encode() * 2), tokenizer.eos_token_id]
    assert decode_answer(tokenizer, example.ids[example.answer_start :]) == text


class Stubborn:
    """A tokenizer that makes a control token of <x> whatever it is asked for."""

    eos_token_id, all_special_tokens, added_tokens_decoder = 0, ("<x>",), {7: "<x>"}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[7 if word == "<x>" else 1 for word in text.split()] for text in texts]}


def test_a_text_that_cannot_be_encoded_is_refused_by_its_words() -> None:
    with raises("model.control_token", match="cannot write '<x>' as text, and this text holds it: 'tag = <x> here'"):
        encode_prompts(Stubborn(), ["tag = <x> here"])
    assert encode_prompts(Stubborn(), ["tag = x"]) == [[1, 1, 1]]


class Shifting:
    """A tokenizer whose tokens of a text depend on whether it adds its own."""

    eos_token_id = 0

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[5, 6] if add_special_tokens else [7, 8, 9] for _ in texts]}


def test_a_tokenizer_of_which_no_prompt_can_be_told_is_refused() -> None:
    with raises("model.odd_tokenizer"):
        encode_prompts(Shifting(), ["x"])


def test_every_space_of_an_answer_stays() -> None:
    tokenizer = tokenizer_of("metaspace", clean_up_tokenization_spaces=True)
    sql = "SELECT 'a , b . c ? do n't' ! x"
    [example] = encode_examples(tokenizer, [""], [sql])
    assert decode_answer(tokenizer, example.ids[example.answer_start :]) == sql


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, [2]), (2, None, [2]), ([128, 129], 128, [2, 128, 129]), (5, [6, 2], [2, 5, 6])],
)
def test_an_answer_ends_at_each_end_token_of_the_model(generation: Any, config: Any, expected: list[int]) -> None:
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation), config=SimpleNamespace(eos_token_id=config)
    )
    assert stop_ids(SimpleNamespace(eos_token_id=2), model) == expected


def test_loading_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = make_tokenizer(CORPUS, 400)
    LlamaForCausalLM(LlamaConfig(**{**tiny_architectures.COMMON, "vocab_size": len(made)})).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    load_tokenizer(named(tmp_path))
    assert "after each text" not in "".join(capsys.readouterr())
    ids = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(named(tmp_path))
    assert "adds </s> after each text; it is left out before the answer" in "".join(capsys.readouterr())
    assert control_ids(tokenizer, encode_prompts(tokenizer, [PROMPT])[0]) == ["<s>"]
