"""Compares the answer generators in new tokens per second, on one GPU, through the interface that `finetune evaluate` uses.

    python -m benchmarks.generation FOLDER                  # Mistral-7B's shape: 1,034 prompts of 187 tokens, 64 new tokens each
    python -m benchmarks.generation FOLDER --generators hf --hf-questions 128 --batch-size 64
    python -m benchmarks.generation FOLDER --generators vllm --engine '{"enforce_eager": true}'
    python -m benchmarks.generation FOLDER --run runs/RUN   # the verdicts of both on a trained run: generation_agreement.py

FOLDER gets a model folder with random weights and a random adapter, unless it has them: 14.5 GB for the 7B shape. vLLM loads
dequantized and merged weights from the disk, which takes as much once more, in TMPDIR or the user's cache. It is looked for as
finetune/evaluation/generators/vllm_place.py says; where it is in this environment, nothing needs to be set. --shared 0.92 makes
that share of each prompt the same within a database of 52 questions, as schemas are in Spider.

Prints a JSON object: for each generator its settings, and for the base and the tuned model the new tokens, their seconds without
loading, tokens per second, and the seconds of loading (writing the weights included). hf answers the first --hf-questions only.
All figures are measured. No answer of a random model is a query, so nearly all have all their tokens; the counts are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.random_model import SHAPES, make
from finetune.config.schema import LoraSection, ModelSection, RunConfig
from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.evaluation.generators.base import Answer, LoadedModel
from finetune.evaluation.generators.registry import generator_named
from finetune.evaluation.generators.vllm_place import ENGINE_VARIABLE
from finetune.models.adapter import BASE, SETTINGS, WEIGHTS, is_sealed, seal_adapter
from finetune.models.architectures import shape_of
from finetune.models.load import load_tokenizer
from finetune.models.source import identity_of_base
from finetune.runtime.console import escape_unprintable
from finetune.runtime.files import write_json
from finetune.tokens import encode_prompts

ROOT = Path(__file__).resolve().parents[1]
A_DATABASE = 52
"""Questions of one database: Spider's development set has 1,034 questions about 20."""


def main() -> int:
    escape_unprintable()
    arguments = parsed()
    if arguments.engine:
        os.environ[ENGINE_VARIABLE] = arguments.engine
    try:
        if arguments.run:
            from benchmarks.generation_agreement import agreement

            result = agreement(arguments.run, arguments.folder, arguments.generators.split(","))
        else:
            result = speed(arguments)
    except UserError as error:
        print(f"error: {error}")
        return EXIT_USER_ERROR
    print(json.dumps(result, indent=1))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mistral-7b")
    parser.add_argument("--generators", default="vllm,hf")
    parser.add_argument("--questions", type=int, default=1034)
    parser.add_argument("--hf-questions", type=int, default=64, help="of them, for hf")
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    parser.add_argument("--prompt-tokens", type=int, default=187)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--shared", type=float, default=0.0, help="share of a prompt that its database's others have, too"
    )
    parser.add_argument("--adapter", choices=("auto", "merged", "apart"), default="auto")
    parser.add_argument("--dequantize", action="store_true", help="hf: evaluation.dequantize")
    parser.add_argument("--bits16", action="store_true", help="quantization.load_in_4bit=false")
    parser.add_argument("--only", choices=("base", "tuned"))
    parser.add_argument("--engine", help=f"JSON for {ENGINE_VARIABLE}: options of vLLM's engine")
    parser.add_argument("--run", type=Path, help="a trained run, whose verdicts are compared")
    return parser.parse_args()


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of every generator, and how many answers of hf are the same text as vLLM's."""
    config, adapter = benchmark_model(arguments)
    prompts = made_prompts(config, arguments.questions, arguments.prompt_tokens, arguments.shared)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    texts: dict[str, dict[str, list[str]]] = {}
    for name in arguments.generators.split(","):
        asked = prompts[: arguments.hf_questions] if name == "hf" else prompts
        found[name], texts[name] = measured(name, config, adapter, asked, arguments)
        print(json.dumps({name: found[name]}), flush=True)
    if {"hf", "vllm"} <= texts.keys():
        found["same_text"] = {
            kind: f"{sum(map(str.__eq__, mine, texts['vllm'][kind]))} of {len(mine)}"
            for kind, mine in texts["hf"].items()
        }
    return found


def measured(
    name: str, config: RunConfig, adapter: Path, prompts: list[str], arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The figures of one generator, and the texts of its answers."""
    generator = generator_named(name)
    found: dict[str, Any] = {
        "version": generator.version, "settings": generator.settings(config), "questions": len(prompts),
        "batch_size": arguments.batch_size if name == "hf" else None,
    }  # fmt: skip
    started = time.monotonic()
    model = generator.load(config, adapter)
    found["load_seconds"] = round(time.monotonic() - started, 1)
    texts: dict[str, list[str]] = {}
    for kind in ("base", "tuned"):
        if arguments.only in (None, kind):
            answers, found[kind] = timed(model, prompts, kind == "tuned", arguments)
            texts[kind] = [answer.text for answer in answers]
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, texts


def timed(
    model: LoadedModel, prompts: list[str], tuned: bool, arguments: argparse.Namespace
) -> tuple[list[Answer], dict[str, Any]]:
    loading, started = getattr(model, "load_seconds", 0.0), time.monotonic()
    first: list[float] = []

    def done(number: int, answer: Answer) -> None:
        if not first:
            first.append(time.monotonic() - started)

    answers = model.answers(
        prompts, tuned=tuned, batch_size=arguments.batch_size, max_new_tokens=arguments.new_tokens, done=done, progress=False
    )  # fmt: skip
    loading = getattr(model, "load_seconds", 0.0) - loading
    seconds = time.monotonic() - started - loading
    tokens = sum(answer.new_tokens for answer in answers)
    return answers, {
        "new_tokens": tokens,
        "whole": sum(answer.new_tokens == arguments.new_tokens for answer in answers),
        "problems": sum(answer.problem is not None for answer in answers),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "load_seconds": round(loading, 1),
        "first_answer_seconds": round(first[0] - loading, 2) if first else None,
    }


def benchmark_model(arguments: argparse.Namespace) -> tuple[RunConfig, Path]:
    """The config of a random model in arguments.folder, and an adapter of it; both are made if they are not there."""
    folder = arguments.folder / arguments.shape
    if not (folder / "tokenizer.json").is_file():
        started = time.monotonic()
        make(arguments.shape, folder, corpus())
        print(f"made {folder} in {time.monotonic() - started:.0f} s", flush=True)
    config = RunConfig(model=ModelSection(name=str(folder), torch_dtype="auto"), lora=LoraSection(lora_dropout=0.0))
    config.quantization.load_in_4bit = not arguments.bits16
    config.evaluation.adapter = arguments.adapter
    config.evaluation.dequantize = arguments.dequantize
    adapter = arguments.folder / f"{arguments.shape}-adapter"
    if not is_sealed(adapter):
        random_adapter(adapter, config)
    return config, adapter


def random_adapter(folder: Path, config: RunConfig) -> None:
    """An adapter of all seven projections, as training writes it; its product is about a twentieth of the base weights."""
    shape = shape_of(config.model.name)
    assert shape is not None
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for module, (inputs, outputs) in shape.projections.items():
            part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            r = config.lora.r
            tensors[f"{name}.lora_A.weight"] = torch.randn(r, inputs, generator=generator) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, r, generator=generator) * 0.01
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.lora.r, "lora_alpha": config.lora.lora_alpha,
        "lora_dropout": config.lora.lora_dropout, "target_modules": list(config.lora.target_modules), "bias": "none",
        "base_model_name_or_path": config.model.name, "inference_mode": True,
    }  # fmt: skip
    write_json(folder / SETTINGS, settings)
    write_json(folder / BASE, identity_of_base(config.model))
    seal_adapter(folder)


def corpus() -> list[str]:
    """Texts to learn a tokenizer and to make prompts from: this project's own."""
    files = sorted([*ROOT.glob("finetune/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.py")])
    return [path.read_text(encoding="utf-8") for path in files]


def made_prompts(config: RunConfig, count: int, tokens: int, shared: float) -> list[str]:
    """Prompts of exactly `tokens` tokens, what the tokenizer adds included. shared: see --shared."""
    tokenizer = load_tokenizer(config.model)
    words = sorted({f" {word}" for text in corpus() for word in text.split() if word.isalpha()})
    lengths = [len(ids) for ids in encode_prompts(tokenizer, words)]
    before = len(encode_prompts(tokenizer, [""])[0])
    sizes = {word: length - before for word, length in zip(words, lengths, strict=True)}
    single = [word for word, size in sizes.items() if size == 1]
    chosen = random.Random(0)

    def text(size: int) -> str:
        found: list[str] = []
        while size:
            word = chosen.choice(words)
            if sizes[word] > size:
                word = chosen.choice(single)
            found.append(word)
            size -= sizes[word]
        return "".join(found)

    common = round((tokens - before) * shared)
    schemas = [text(common) for _ in range(-(-count // A_DATABASE))]
    prompts = [schemas[number // A_DATABASE] + text(tokens - before - common) for number in range(count)]
    found = {len(ids) for ids in encode_prompts(tokenizer, prompts)}
    assert found == {tokens}, f"prompts of {found} tokens"
    return prompts


if __name__ == "__main__":
    raise SystemExit(main())
