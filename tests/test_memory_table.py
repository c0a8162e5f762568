"""What `finetune plan --memory` prints, read back from the text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config import RunConfig, load_config
from finetune.errors import UserError
from finetune.gpus import GPUS
from finetune.memory import CONTEXT_GIB, GIB, SHAPES, estimate, fits, largest_rows, workload_of
from finetune.memory_table import memory_table

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "mistral_7b_qlora.yaml"
MISTRAL = SHAPES["mistralai/Mistral-7B-v0.1"]


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, list(overrides))


def blocks(text: str) -> list[list[list[str]]]:
    """Blocks of rows of cells; cells are two or more blanks apart."""
    return [
        [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in block.splitlines()]
        for block in text.split("\n\n")
    ]


def test_the_parts_are_those_of_the_estimate_and_add_up() -> None:
    _, parts, _, _ = blocks(memory_table(config(), ["A100", "T4"]))
    assert parts[0] == ["compute dtype", "bfloat16", "float16"]
    assert parts[1] == ["gradient checkpointing", "on", "off", "on", "off"]
    assert [row[0] for row in parts[2:]] == [
        *("base model, nf4", "adapters, float32", "gradients, float32", "optimizer, paged_adamw_8bit"),
        *("activations", "logits", "workspace", "reserve of the allocator", "CUDA context", "sum"),
    ]
    for column, on in enumerate((True, False, True, False), start=1):
        needed = estimate(MISTRAL, replace(workload_of(config(), "bfloat16"), checkpointing=on))
        printed = [float(row[column]) for row in parts[2:]]
        assert printed[:8] == [round(size / GIB, 2) for size in needed.parts.values()]
        assert printed[8] == CONTEXT_GIB
        assert printed[9] == round(needed.reserved / GIB + CONTEXT_GIB, 2) == pytest.approx(sum(printed[:9]), abs=0.05)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_each_gpu_has_its_verdict_and_its_largest_batches(checkpointing: bool) -> None:
    wanted = config(f"training.gradient_checkpointing={str(checkpointing).lower()}")
    _, _, verdicts, _ = blocks(memory_table(wanted, list(GPUS)))
    assert [row[0] for row in verdicts[1:]] == list(GPUS)
    for name, dtype, needed, memory, verdict, on, off in verdicts[1:]:
        gpu, load = GPUS[name], workload_of(wanted, dtype)
        assert dtype == gpu.dtype
        assert float(needed) == round(estimate(MISTRAL, load).reserved / GIB + CONTEXT_GIB, 2)
        assert float(memory) == gpu.memory_gib
        assert verdict == ("yes" if fits(estimate(MISTRAL, load), gpu.memory_gib) else "no")
        for printed, setting in ((on, True), (off, False)):
            rows = largest_rows(MISTRAL, replace(load, checkpointing=setting), gpu.memory_gib)
            assert printed == (str(rows) if rows else "none")
    assert {row[4] for row in verdicts[1:]} == ({"yes"} if checkpointing else {"yes", "no"})


def test_columns_stand_under_each_other() -> None:
    text = memory_table(config(), list(GPUS))
    parts, verdicts = text.split("\n\n")[1:3]
    for table in (parts.splitlines()[1:], verdicts.splitlines()):
        assert len({len(line) for line in table}) == 1, table
    assert max(map(len, text.splitlines())) <= 120


def test_a_gpu_named_twice_is_shown_once() -> None:
    _, _, verdicts, _ = blocks(memory_table(config(), ["T4", "T4"]))
    assert [row[0] for row in verdicts] == ["GPU", "T4"]


def test_it_says_what_is_estimated_and_against_what() -> None:
    text = memory_table(config("training.gradient_checkpointing=false"), ["A100"])
    assert "micro-batch of 4 x 2048 tokens, LoRA r 16 (41.9e6 parameters), dropout 0.05" in text
    assert "fits: as the config has it (checkpointing off)" in text
    assert "All figures are estimated" in text
    said = " ".join(text.split())
    assert "each on one H100 80GB (torch 2.11" in said
    assert "ten cells of our own trainer (2026-11-22), and the 46 of a grid" in said
    assert "within 1% in ours and 0.1% in the grid, and with the reserve within 3% in all" in said


def test_a_dtype_that_the_config_names() -> None:
    _, parts, verdicts, _ = blocks(memory_table(config("model.torch_dtype=bfloat16"), ["T4", "A100"]))
    assert parts[0] == ["compute dtype", "bfloat16"]
    assert verdicts[1][4:] == ["no bfloat16", "none", "none"]
    assert verdicts[2][4:] == ["yes", "27", "2"]


def test_a_base_that_is_not_quantised() -> None:
    _, parts, _, _ = blocks(memory_table(config("quantization.load_in_4bit=false"), ["A100"]))
    assert parts[2] == ["base model, not quantised", "13.49", "13.49"]


def test_a_model_folder_needs_only_its_config(tmp_path: Path) -> None:
    values = {
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    known, read = (blocks(memory_table(config(*change), ["L4"])) for change in ([], [f"model.name={tmp_path}"]))
    assert known[1:] == read[1:]


def test_what_is_unknown_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.name: the shape of some/model is not known.*config\.json.*name that folder"
    ):
        memory_table(config("model.name=some/model"), ["A100"])
    with pytest.raises(UserError, match=r"plan\.gpus: unknown A10, K80; known: T4, V100, L4"):
        memory_table(config(), ["A100", "A10", "K80"])
    with pytest.raises(UserError, match=r"plan\.gpus: name at least one GPU"):
        memory_table(config(), [])
    with pytest.raises(UserError, match=r"lora\.target_modules: .* not for lm_head"):
        memory_table(config("lora.target_modules=[q_proj,lm_head]"), ["A100"])
