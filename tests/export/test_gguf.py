"""GGUF files: llama.cpp computes what transformers computes, and reads what training read."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.export import gguf_types
from finetune.export.gguf_file import write_gguf
from finetune.export.gguf_tokenizer import _LLAMA_3, _QWEN_2, differing
from finetune.export.gguf_types import check_quantiser, quantised, type_of
from finetune.export.model_files import check_tokens
from finetune.models.llama_cpp import LlamaServer
from finetune.models.load import load_tokenizer
from finetune.models.merging import MergedWeights
from tests.helpers.adapted_models import CORPUS, FAMILIES, adapter_folder, base_folder, config_of
from tests.helpers.errors import raises

pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")

TEXTS = [
    "### sqlite schema\nCREATE TABLE a (b TEXT, c2024 INT)\n### Question\n12345 in 2024, \u201cna\u00efve\u201d ones?\n### SQL\n",
    "a  b\n\n  \tc \u00c4\u00d6 \u6f22\u5b57 \U0001f999 don't x=3.14;  ",
    " leading", "", "x" * 300, "'S 1 22 333 4444\r\n\r\n",
]  # fmt: skip


def written(tmp_path: Path, family: str, *quantizations: str, adapter: bool = True, **changes: Any) -> dict[str, Path]:
    config = config_of(base_folder(tmp_path / "base", family, **changes), load_in_4bit=True)
    folder = adapter_folder(tmp_path / "adapter", config) if adapter else None
    weights = MergedWeights.of(config, adapter=folder, dtype=torch.float32)
    files = {name: tmp_path / f"{name}.gguf" for name in quantizations}
    write_gguf(weights, load_tokenizer(config.model), files, name="tiny")
    merged = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    merged.load_state_dict({entry.name: weights.tensor(entry.name) for entry in weights.entries}, strict=False)
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(config.model).save_pretrained(tmp_path / "merged")
    return files


def next_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=3
    )
    found: list[int] = answer[0][len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    """On float32 the greedy tokens are the same: names, rotary order, biases, scaling and the adapter are right."""
    files = written(tmp_path, family, "f32")
    prompt = list(range(10, 150))  # beyond the 64 positions that the scaled family was trained on
    with LlamaServer(files["f32"], context_tokens=256, parallel=1) as server:
        body = {"prompt": prompt, "n_predict": 16, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        found = server.request("/completion", body)["tokens"]
    assert found == next_tokens(tmp_path / "merged", prompt, 16)
    assert len(set(found)) > 1, "no constant"


def test_both_quantizations_load_in_llama_cpp_python(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python has no wheel, and is not installed")
    files = written(tmp_path, "apart", "q8_0", "q4_k_m", hidden_size=256, intermediate_size=512)
    expected = next_tokens(tmp_path / "merged", list(range(10, 40)), 1)[0]
    for name, path in files.items():
        model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
        assert model.n_embd() == 256
        model.eval(list(range(10, 40)))
        scores = numpy.array(model.scores[model.n_tokens - 1])
        best = scores.argsort()[::-1]
        place = list(best).index(expected)
        assert place == 0 if name == "q8_0" else place < 10, "of 300 tokens: sane, though 4 bits lose something"
        model.close()


@pytest.mark.parametrize("hidden", [64, 256], ids=["rows of 64", "rows of 256"])
def test_the_bytes_are_those_of_llama_cpps_quantiser(tmp_path: Path, hidden: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python has no wheel, and is not installed")
    kinds = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
    for family in ("tied", "apart"):
        folder = tmp_path / family
        files = written(folder, family, "f32", *kinds, hidden_size=hidden, num_hidden_layers=9)
        for name, kind in kinds.items():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.nthread = kind, 1
            theirs = folder / "theirs.gguf"
            result = llama_cpp.llama_model_quantize(bytes(files["f32"]), bytes(theirs), ctypes.byref(settings))
            assert result == 0
            expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
            found = {tensor.name: tensor for tensor in GGUFReader(files[name]).tensors}
            assert found.keys() == expected.keys()
            for tensor in expected.values():
                assert found[tensor.name].tensor_type == tensor.tensor_type, tensor.name
                assert numpy.array_equal(found[tensor.name].data, tensor.data), tensor.name


def test_the_mixture_of_q4_k_m() -> None:
    """As llama.cpp has it for 32 layers: of value and down projections layers 0-3, 28-31 and every third between have 6 bits."""

    def kind(name: str, shape: tuple[int, ...] = (4096, 4096), tied: bool = False) -> Type:
        return type_of(name, shape, "q4_k_m", layers=32, tied=tied)

    more = [layer for layer in range(32) if kind(f"blk.{layer}.ffn_down.weight") == Type.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert kind("blk.0.attn_v.weight") == Type.Q6_K and kind("blk.4.attn_v.weight") == Type.Q4_K
    assert kind("blk.0.attn_q.weight") == kind("token_embd.weight") == Type.Q4_K
    assert kind("output.weight") == kind("token_embd.weight", tied=True) == Type.Q6_K
    assert kind("blk.0.attn_q.weight", (4096, 576)) == Type.Q5_0 and kind("output.weight", (9, 576)) == Type.Q8_0
    assert kind("blk.0.attn_q.weight", (4096, 100)) == Type.F16
    assert kind("blk.0.attn_norm.weight", (4096,)) == kind("blk.0.attn_q.bias", (4096,)) == Type.F32


def test_plain_types_round_once() -> None:
    values = numpy.array([[1.0, 1e-3, -3.14159, 65000.0] * 16], dtype=numpy.float32)
    assert (quantised(values, Type.F16).view(numpy.float16) == values.astype(numpy.float16)).all()
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
    assert (quantised(values, Type.BF16) == bits).all()


# tokenizers


def folder_with(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = base_folder(tmp_path / "base", "apart", vocab_size=len(tokenizer))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def byte_level(steps: list[Any], **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *TEXTS, "1234 5678 12 345 'S 't don't we'LL"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|im_end|>", **special
    )


def by_characters() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: pieces of characters with a mark for spaces, and bytes for what has no piece."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        [text.replace(" ", "\u2581") for text in [*CORPUS, "How many in 2024 names"]] * 3, trainer
    )
    values = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    inner = values.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return values


SPLIT = {"pattern": None, "behavior": "isolated"}
TOKENIZERS = {
    "gpt-2": lambda: byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm": lambda: byte_level(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: byte_level([_split(_QWEN_2), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "llama-bpe": lambda: byte_level(
        [_split(_LLAMA_3), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], bos_token="<|im_end|>"
    ),
    "default": by_characters,
}


def _split(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_the_same_tokens(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, TOKENIZERS[name]())
    config = config_of(folder, load_in_4bit=False)
    tokenizer = load_tokenizer(config.model)
    path = tmp_path / "model.gguf"
    write_gguf(MergedWeights.of(config, adapter=None, dtype=torch.float32), tokenizer, {"f16": path}, name="tiny")
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    assert field is not None and field.contents() == name
    with LlamaServer(path, context_tokens=64, parallel=1) as server:
        assert differing(server, tokenizer, TEXTS) == ""
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert differing(server, tokenizer, ["ABC"]) == "ABC", "a difference is seen"
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    with raises("export.other_tokens"):
        check_tokens(path, model, ["ABC"])


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    for number, tokenizer in enumerate(
        [byte_level([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]), unigram()]
    ):
        config = config_of(folder_with(tmp_path / str(number), tokenizer), load_in_4bit=False)
        weights = MergedWeights.of(config, adapter=None, dtype=torch.float32)
        with raises("export.no_gguf"):
            write_gguf(weights, load_tokenizer(config.model), {"f16": tmp_path / "x.gguf"}, name="tiny")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "apart")
    config = config_of(folder, load_in_4bit=False)
    weights = MergedWeights.of(config, adapter=None, dtype=torch.float32)
    weights.config.model_type = "gemma"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with raises("export.no_gguf"):
        write_gguf(weights, tokenizer, {"f16": tmp_path / "x.gguf"}, name="tiny")
    weights.config.model_type = "mistral"
    weights.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1.0}
    with raises("export.no_gguf"):
        write_gguf(weights, tokenizer, {"f16": tmp_path / "x.gguf"}, name="tiny")


def test_another_version_of_the_package_may_lack_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_types._library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", lambda path: object())
    with raises("export.no_quantiser"):
        check_quantiser()
    monkeypatch.undo()
    gguf_types._library.cache_clear()
    check_quantiser()
    assert issubclass(UserError, Exception)
