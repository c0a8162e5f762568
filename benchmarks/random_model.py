"""Writes a model folder with random weights and a newly trained tokenizer: for tests of speed, memory and plumbing, not quality.

    python -m benchmarks.random_model mistral-7b /tmp/mistral --corpus data/built/train.jsonl

Where no weights can be downloaded, `finetune train` runs on such a folder unchanged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

SHAPES: dict[str, Any] = {
    # The config of mistralai/Mistral-7B-v0.1.
    "mistral-7b": lambda: MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    ),
}  # fmt: skip


def make(shape: str, folder: Path, corpus: Iterable[str], *, seed: int = 0) -> None:
    """Write config, tokenizer and weights (bfloat16, float32 for the tiny shape; generated on the GPU if there is one)."""
    torch.manual_seed(seed)
    config = SHAPES[shape]()
    tokenizer = make_tokenizer(corpus, config.vocab_size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if shape == "tiny" else torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus; it prepends <s>, as Mistral's does."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model folder with random weights.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, required=True, help="records (JSONL) to learn a tokenizer from")
    parsed = parser.parse_args()
    lines = parsed.corpus.read_text(encoding="utf-8").splitlines()
    make(parsed.shape, parsed.folder, (f"{r['schema']}\n{r['question']}\n{r['sql']}" for r in map(json.loads, lines)))


if __name__ == "__main__":
    main()
