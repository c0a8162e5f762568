"""What `finetune plan --memory` prints, read back from the text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.estimate.fit import fit_on, usual_step_tokens
from finetune.estimate.memory_hf import CONTEXT_GIB, estimate, fits, largest_micro_batch, workload_of
from finetune.estimate.memory_table import memory_table
from finetune.machine.gpus import GPUS
from finetune.machine.hardware import GIB
from finetune.models.architectures import SHAPES
from tests.helpers.errors import raises

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mistral_7b_qlora.yaml"
MISTRAL = SHAPES["mistralai/Mistral-7B-v0.1"]


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, list(overrides))


def blocks(text: str) -> list[list[list[str]]]:
    """Blocks of rows of cells; cells are two or more spaces apart."""
    return [
        [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in block.splitlines()]
        for block in text.split("\n\n")
    ]


HF = ("training.kernels=hf", "training.per_device_train_batch_size=4")
PARTS = (
    *("base model, nf4", "adapters, float32", "gradients, float32", "optimizer, paged_adamw_8bit"),
    *("activations", "logits", "workspace", "reserve of the allocator", "CUDA context", "sum"),
)
USUAL = usual_step_tokens(16, config().plan.mean_tokens)


# ---- the fused backend


def test_each_gpu_has_what_the_run_chooses_there() -> None:
    _, choices, _, _ = blocks(memory_table(config(), list(GPUS)))
    assert [row[0] for row in choices[1:]] == list(GPUS)
    for name, dtype, tokens, kept, dequantized, needed, memory, verdict in choices[1:]:
        found = fit_on(config(), MISTRAL, GPUS[name], usual_step=USUAL)
        assert found.limits and dtype == GPUS[name].dtype
        assert (tokens, kept) == (f"{found.limits.tokens:,}", f"{found.limits.uncheckpointed_layers} of 32")
        assert dequantized == f"{found.limits.dequantized_layers} of 32"
        assert (needed, float(memory)) == (f"{found.needed_gib:.2f}", GPUS[name].memory_gib)
        assert verdict == "yes"


def test_the_fused_parts_are_those_of_the_choice_and_add_up() -> None:
    _, _, parts, _ = blocks(memory_table(config(), ["A100", "T4"]))
    assert parts[0] == ["A100", "T4"]
    labels = [row[0] for row in parts[1:]]
    assert labels == [f"{PARTS[0]}, with dequantized weights", "adapters, with copies", *PARTS[2:]]
    for column, name in enumerate(parts[0], start=1):
        needed = fit_on(config(), MISTRAL, GPUS[name], usual_step=USUAL).needed
        printed = [float(row[column]) for row in parts[1:]]
        assert printed[:8] == [round(size / GIB, 2) for size in needed.parts.values()]
        assert printed[9] == round(needed.reserved / GIB + CONTEXT_GIB, 2) == pytest.approx(sum(printed[:9]), abs=0.05)


def test_explicit_numbers_are_used_even_if_they_do_not_fit() -> None:
    big = config("training.per_device_train_batch_size=16", "training.gradient_checkpointing=false")
    _, choices, _, _ = blocks(memory_table(big, ["T4", "A100"]))
    for row in choices[1:]:
        assert row[2:5] == ["32,768", "32 of 32", "0 of 32"] and row[7] == "no"
        assert float(row[5]) > float(row[6])
    capped = blocks(memory_table(config("training.max_memory_gib=12"), ["H100"]))[1][1]
    assert capped[6] == "12.0" and float(capped[5]) < 12


def test_the_fused_table_says_what_its_words_mean() -> None:
    text = memory_table(config(), ["A100"])
    assert "texts of up to 2048 tokens, LoRA r 16 (41.9e6 parameters), dropout 0.05" in text
    said = " ".join(text.split())
    assert "all estimated" in said and "No other GPU was measured" in said
    assert "an optimizer step of 16 examples" in said and "It leaves 3% free" in said
    assert "on one H100 80GB (2026-11-22)" in said


def test_batch_sizes_that_agree_on_several_gpus_alone_have_a_table() -> None:
    four = ("per_device_train_batch_size=4", "gradient_accumulation_steps=4", "effective_batch_size=64")
    whole = config(*(f"training.{word}" for word in four))
    assert "an optimizer step of 64 examples" in " ".join(memory_table(whole, ["L4", "L4:4"]).split())
    with raises("config.conflicting_values", match="64 is not 16"):
        memory_table(whole, ["L4"])


# ---- the Hugging Face backend


def test_the_hf_parts_are_those_of_the_estimate_and_add_up() -> None:
    _, parts, _, _ = blocks(memory_table(config(*HF), ["A100", "T4"]))
    assert parts[0] == ["compute dtype", "bfloat16", "float16"]
    assert parts[1] == ["rows x tokens", "4 x 2048", "4 x 2048"]
    assert parts[2] == ["gradient checkpointing", "on", "off", "on", "off"]
    assert tuple(row[0] for row in parts[3:]) == PARTS
    for column, on in enumerate((True, False, True, False), start=1):
        needed = estimate(MISTRAL, replace(workload_of(config(*HF), "bfloat16"), checkpointing=on))
        printed = [float(row[column]) for row in parts[3:]]
        assert printed[:8] == [round(size / GIB, 2) for size in needed.parts.values()]
        assert printed[8] == CONTEXT_GIB
        assert printed[9] == round(needed.reserved / GIB + CONTEXT_GIB, 2) == pytest.approx(sum(printed[:9]), abs=0.05)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_each_gpu_has_its_verdict_and_its_largest_batches(checkpointing: bool) -> None:
    wanted = config(*HF, f"training.gradient_checkpointing={str(checkpointing).lower()}")
    _, _, verdicts, _ = blocks(memory_table(wanted, list(GPUS)))
    assert [row[0] for row in verdicts[1:]] == list(GPUS)
    for name, dtype, rows, needed, memory, verdict, on, off in verdicts[1:]:
        gpu, load = GPUS[name], workload_of(wanted, dtype)
        assert (dtype, rows) == (gpu.dtype, "4")
        assert float(needed) == round(estimate(MISTRAL, load).reserved / GIB + CONTEXT_GIB, 2)
        assert float(memory) == gpu.memory_gib
        assert verdict == ("yes" if fits(estimate(MISTRAL, load), gpu.memory_gib) else "no")
        for printed, setting in ((on, True), (off, False)):
            most = largest_micro_batch(MISTRAL, replace(load, checkpointing=setting), gpu.memory_gib)
            assert printed == (str(most) if most else "none")
    assert {row[5] for row in verdicts[1:]} == ({"yes"} if checkpointing else {"yes", "no"})


def test_hf_rows_are_as_many_as_fit_where_the_config_leaves_them_open() -> None:
    _, parts, verdicts, _ = blocks(memory_table(config("training.kernels=hf"), ["T4", "L4", "A100"]))
    assert [row[2] for row in verdicts[1:]] == ["7", "13", "16"] and [row[6] for row in verdicts[1:]] == [
        "7",
        "13",
        "27",
    ]
    assert parts[1] == ["rows x tokens", "7 x 2048", "13 x 2048", "16 x 2048"]


def test_the_hf_table_says_what_is_estimated_and_against_what() -> None:
    text = memory_table(config(*HF, "training.gradient_checkpointing=false"), ["A100"])
    assert "fits: as the config has it (checkpointing off)" in text
    assert "(checkpointing on)" in memory_table(config(*HF), ["A100"])
    said = " ".join(text.split())
    assert "All figures are estimated" in said and "each on one H100 80GB (torch 2.11" in said
    assert "ten cells of our own trainer (2026-11-22), and the 46 of a grid" in said
    assert "within 1% in ours and 0.1% in the grid, and with the reserve within 3% in all" in said


# ---- both


@pytest.mark.parametrize("changes", [(), HF])
def test_columns_are_aligned(changes: tuple[str, ...]) -> None:
    text = memory_table(config(*changes), list(GPUS))
    for block in text.split("\n\n")[1:3]:
        lines = [line for line in block.splitlines() if not line.startswith(("compute dtype", "rows x tokens"))]
        assert len({len(line) for line in lines}) == 1, lines
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("changes", [(), HF])
def test_a_gpu_named_twice_is_shown_once(changes: tuple[str, ...]) -> None:
    verdicts = blocks(memory_table(config(*changes), ["T4", "T4"]))[2 if changes else 1]
    assert [row[0] for row in verdicts] == ["GPU", "T4"]


def test_a_dtype_that_the_config_names() -> None:
    hf = blocks(memory_table(config(*HF, "model.torch_dtype=bfloat16"), ["T4", "A100"]))
    assert hf[1][0] == ["compute dtype", "bfloat16"]
    assert hf[2][1][5:] == ["no bfloat16", "none", "none"]
    assert hf[2][2][5:] == ["yes", "27", "2"]
    fused = blocks(memory_table(config("model.torch_dtype=bfloat16"), ["T4", "A100"]))
    assert [(row[1], row[7]) for row in fused[1][1:]] == [("bfloat16", "no bfloat16"), ("bfloat16", "yes")]


def test_a_base_that_is_not_quantised() -> None:
    whole = config("quantization.load_in_4bit=false")
    _, choices, parts, _ = blocks(memory_table(whole, ["A100"]))
    assert parts[1] == ["base model, not quantised", "13.49"]
    assert choices[1][4] == "0 of 32"


def test_a_model_folder_needs_only_its_config(tmp_path: Path) -> None:
    values = {
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    known, read = (blocks(memory_table(config(*change), ["L4"])) for change in ([], [f"model.name={tmp_path}"]))
    assert known[1:] == read[1:]


def test_unknown_names_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with raises(
        "model.unknown_shape",
        match=r"model\.name: the shape of some/model is not known.*config\.json.*name that folder",
    ):
        memory_table(config("model.name=some/model"), ["A100"])
    with raises("cloud.unknown_gpu", match=r"plan\.gpus: unknown A10, K80; known: T4, V100, L4"):
        memory_table(config(), ["A100", "A10", "K80"])
    with raises("plan.no_gpu", match=r"plan\.gpus: name at least one GPU"):
        memory_table(config(), [])
    with raises("lora.unknown_modules"):
        memory_table(config("lora.target_modules=[q_proj,kv_proj]"), ["A100"])
