"""Merged weights: the same bits as PEFT's, in bounded memory, and refused where the adapter is not of this base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import RunConfig
from finetune.models import weight_files
from finetune.models.adapter import WEIGHTS, seal_adapter
from finetune.models.device import Device
from finetune.models.load import load_adapter, load_base
from finetune.models.merging import MergedWeights, write_weights
from finetune.models.weight_files import INDEX, BaseWeights
from tests.helpers.adapted_models import adapter_folder, base_folder, config_of
from tests.helpers.errors import raises

CPU = Device(torch.device("cpu"), torch.float32)


def merged_by_peft(config: RunConfig, adapter: Path) -> dict[str, torch.Tensor]:
    model = load_base(config.model, config.quantization, CPU, dequantize=True)
    merged: dict[str, torch.Tensor] = (
        load_adapter(model, adapter, config.lora, config.model).merge_and_unload().state_dict()
    )
    return merged


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["tied", "apart", "biases", "scaled"])
@pytest.mark.parametrize("load_in_4bit", [True, False], ids=["nf4", "whole"])
def test_merged_weights_are_those_of_peft_to_the_bit(tmp_path: Path, family: str, load_in_4bit: bool) -> None:
    config = config_of(base_folder(tmp_path / "base", family), load_in_4bit=load_in_4bit)
    adapter = adapter_folder(tmp_path / "adapter", config)
    (tmp_path / "merged").mkdir()
    written = write_weights(config, tmp_path / "merged", adapter=adapter, dtype=torch.float32, shard_bytes=60_000)
    assert written.base == ("dequantized" if load_in_4bit else "original") and written.layers == 7 * 3
    assert INDEX in written.files and len(written.files) > 4, "several shards"
    merged = loaded(tmp_path / "merged")
    assert equal(merged, merged_by_peft(config, adapter))
    assert not equal(merged, loaded(tmp_path / "base"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_values_are_those_of_transformers(tmp_path: Path, kind: str, trained: torch.dtype) -> None:
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=True)
    config.quantization.bnb_4bit_quant_type = kind  # type: ignore[assignment]
    config.quantization.bnb_4bit_use_double_quant = kind == "nf4"
    expected = load_base(config.model, config.quantization, Device(CPU.place, trained), dequantize=True).state_dict()
    weights = MergedWeights.of(config, adapter=None, dtype=torch.float32, trained_dtype=trained)
    found = {entry.name: weights.tensor(entry.name) for entry in weights.entries}
    assert equal(found, {name: tensor.float() for name, tensor in expected.items()})
    plain = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(found[name], plain[name]) for name in found), "4 bits lose something"


def test_the_original_weights_are_another_base(tmp_path: Path) -> None:
    config = config_of(base_folder(tmp_path / "base", "biases"), load_in_4bit=True)
    adapter = adapter_folder(tmp_path / "adapter", config)
    whole = config_of(tmp_path / "base", load_in_4bit=False)
    weights = MergedWeights.of(
        config, adapter=adapter, base="original", dtype=torch.float32, trained_dtype=torch.bfloat16
    )
    found = {entry.name: weights.tensor(entry.name) for entry in weights.entries}
    assert weights.base == "original"
    assert equal(found, merged_by_peft(whole, adapter)), "not rounded to the dtype of training"


def test_a_pickled_base_is_read_too(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "apart")
    config = config_of(folder, load_in_4bit=False)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    weights = MergedWeights.of(config, adapter=None, dtype=torch.float32)
    assert equal({entry.name: weights.tensor(entry.name) for entry in weights.entries}, tensors)


def test_a_head_that_differs_from_tied_embeddings_is_kept(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "tied")
    tensors = load_file(folder / "model.safetensors")
    config = config_of(folder, load_in_4bit=False)
    for change, tied in ((0.0, True), (1.0, False)):
        head = tensors["model.embed_tokens.weight"] + change
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        weights = MergedWeights.of(config, adapter=None, dtype=torch.float32)
        assert weights.config.tie_word_embeddings is tied
        assert ("lm_head.weight" in {entry.name for entry in weights.entries}) is not tied


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    config = config_of(base_folder(tmp_path / "base", "tied"), load_in_4bit=False)
    adapter = adapter_folder(tmp_path / "adapter", config)
    other = config_of(base_folder(tmp_path / "other", "apart"), load_in_4bit=False)
    with raises("adapter.other_base"):
        write_weights(other, tmp_path, adapter=adapter, dtype=torch.float32)
    (adapter / "base.json").unlink()  # as in earlier versions, which did not say
    seal_adapter(adapter)
    config.lora.target_modules = ["q_proj"]
    with raises("adapter.other_run"):
        write_weights(config, tmp_path, adapter=adapter, dtype=torch.float32)


@pytest.mark.parametrize("damage", ["lacks", "foreign", "shape", "nan"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=False)
    adapter = adapter_folder(tmp_path / "adapter", config)
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    if damage == "lacks":
        del tensors[name]
    elif damage == "foreign":
        tensors["other"] = torch.zeros(1)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name][0, 0] = torch.nan
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    seal_adapter(adapter)
    with raises("adapter.mismatch"):
        write_weights(config, tmp_path, adapter=adapter, dtype=torch.float32)


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=False)
    adapter = adapter_folder(tmp_path / "adapter", config, scale=1e6)
    with raises("merge.out_of_range"):
        write_weights(config, tmp_path, adapter=adapter, dtype=torch.float16)
    assert not (tmp_path / "config.json").exists(), "no model without its last file"


def test_a_base_that_is_stored_in_4_bits_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "apart")
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    path.write_text(json.dumps(values))
    with raises("merge.quantized_base"):
        write_weights(config_of(folder, load_in_4bit=True), tmp_path, adapter=None, dtype=torch.float32)


@pytest.mark.parametrize("damage", ["cut", "no tensor", "no shard", "outside", "no index"])
def test_a_damaged_base_is_refused(tmp_path: Path, damage: str) -> None:
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=False)
    folder = tmp_path / "whole"
    folder.mkdir()
    write_weights(config, folder, adapter=None, dtype=torch.float32, shard_bytes=100_000)
    index = json.loads((folder / INDEX).read_text())
    shard = folder / sorted(set(index["weight_map"].values()))[1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "no shard":
        shard.unlink()
    elif damage == "no index":
        (folder / INDEX).write_text("{")
    else:
        name = next(iter(index["weight_map"]))
        if damage == "no tensor":
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = "../base/model.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
    with raises("model.incomplete"):
        write_weights(config_of(folder, load_in_4bit=False), tmp_path, adapter=None, dtype=torch.float32)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which only root can make."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=False)
    with raises("disk.full", match=r"0\.\d GB are needed"):
        write_weights(config, small_disk, adapter=None, dtype=torch.float32)
    assert not list(small_disk.iterdir()), "found before the first byte"
    monkeypatch.setattr(weight_files, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1 << 40)))
    (small_disk / "ballast").write_bytes(bytes(800_000))  # another program takes the room meanwhile
    with raises("disk.full", match="no space left"):
        write_weights(config, small_disk, adapter=None, dtype=torch.float32)


PEAK = """
import sys, torch
from pathlib import Path
from finetune.models.merging import write_weights
from tests.helpers.adapted_models import config_of
config = config_of(Path(sys.argv[1]), load_in_4bit=True)
write_weights(config, Path(sys.argv[2]), adapter=None, dtype=torch.bfloat16)
# getrusage would give that of the process that started this one, if it was larger
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_mib(base: Path, out: Path) -> float:
    """MiB of memory of a process that merges, at its peak."""
    out.mkdir()
    command = [sys.executable, "-c", PEAK, str(base), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"}
    )
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """512 wide: 8 MB a layer in bfloat16; 24 layers more are 200 MB more in the files."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    peaks = {}
    for layers in (2, 26):
        folder = base_folder(tmp_path / f"base-{layers}", "apart", torch.bfloat16, num_hidden_layers=layers, **wide)
        peaks[layers] = peak_mib(folder, tmp_path / f"out-{layers}")
        shutil.rmtree(folder)
    size = sum(path.stat().st_size for path in (tmp_path / "out-26").iterdir()) / 2**20
    assert size > 180
    print(peaks)
    assert peaks[26] - peaks[2] < 30, peaks


def test_parts_are_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "PART_BYTES", 1000)
    folder = base_folder(tmp_path / "base", "apart")
    tensors = load_file(folder / "model.safetensors")
    weights = BaseWeights(folder)
    for name, tensor in tensors.items():
        parts = list(weights.parts(name))
        assert torch.equal(torch.cat(parts), tensor)
        assert len(parts) > 1 or tensor.numel() * 4 <= 1000
