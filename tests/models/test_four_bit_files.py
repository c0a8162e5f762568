"""Kept 4-bit weights are those of the originals to the last bit, and are used only where they are exactly what is asked."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.machine.four_bit_place import VARIABLE
from finetune.models import four_bit_files as files
from finetune.models import load, source
from finetune.models.device import Device
from finetune.models.four_bit_files import four_bit_files
from tests.helpers.model_examples import CPU, NF4

HUB = ModelSection(name="some-org/tiny", revision="0123456789abcdef0123456789abcdef01234567")
BFLOAT16 = Device(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def root(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept. HUB is the tiny model, as if it lay in the hub's cache."""
    own = source.resolve_name
    monkeypatch.setattr(source, "resolve_name", lambda name: str(tiny_model) if name == HUB.name else own(name))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "four-bit"))
    return tmp_path / "four-bit"


@pytest.fixture
def only_kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on reading the originals fails."""

    def forbid() -> None:
        monkeypatch.setattr(load, "_originals", lambda *_: pytest.fail("the originals were read"))

    return forbid


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def everything(model: Any) -> dict[str, Any]:
    """Every parameter and buffer with its bits, and the scales of the 4-bit ones."""
    found: dict[str, Any] = {name: bits(buffer) for name, buffer in model.named_buffers()}
    for name, one in model.named_parameters():
        found[name] = (type(one).__name__, one.requires_grad, bits(one))
        if (state := getattr(one, "quant_state", None)) is not None:
            nested = [bits(state.state2.absmax), bits(state.state2.code), bits(state.offset)] if state.nested else []
            shape = (state.dtype, tuple(state.shape), state.blocksize, state.quant_type)
            found[name] += (
                shape,
                bits(state.absmax),
                bits(state.code),
                nested,
                one.quant_type,
                one.compress_statistics,
            )
    return found


@pytest.mark.parametrize(
    "device", [CPU, BFLOAT16, replace(CPU, quantized_in=torch.bfloat16)], ids=["f32", "bf16", "bf16 as f32"]
)
@pytest.mark.parametrize(
    "settings", [NF4, replace(NF4, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)], ids=["nf4", "fp4"]
)
def test_they_are_the_same_bits(
    settings: QuantizationSection, device: Device, root: Path, only_kept: Callable[[], None]
) -> None:
    torch.manual_seed(1)
    first = load.load_base(HUB, settings, device)
    then = torch.get_rng_state()
    only_kept()
    torch.manual_seed(1)
    second = load.load_base(HUB, settings, device)
    assert torch.equal(torch.get_rng_state(), then), "the adapters that are drawn next are the same, too"
    assert everything(second) == everything(first)
    assert sum("Params4bit" in str(one[0]) for one in everything(second).values()) == 14
    assert second.config.to_diff_dict() == first.config.to_diff_dict()
    assert second.generation_config.to_dict() == first.generation_config.to_dict()  # type: ignore[union-attr]
    tokens = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        assert bits(second(tokens).logits) == bits(first(tokens).logits)


def test_adapters_name_the_model_and_not_the_folder(
    root: Path, tiny_model: Path, only_kept: Callable[[], None]
) -> None:
    from finetune.config.schema import LoraSection

    load.load_base(HUB, NF4, CPU)
    only_kept()
    second = load.attach_lora(load.load_base(HUB, NF4, CPU), LoraSection())
    assert second.peft_config["default"].base_model_name_or_path == HUB.name


def test_they_are_dequantised_to_the_same_bits(root: Path, only_kept: Callable[[], None]) -> None:
    first = load.load_base(HUB, NF4, CPU, dequantize=True)
    only_kept()
    second = load.load_base(HUB, NF4, CPU, dequantize=True)
    assert everything(second) == everything(first)
    assert not load.is_four_bit(second)


def test_what_is_said_when_they_are_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load.load_base(HUB, NF4, CPU)
    assert "4-bit weights kept for later launches: 0.00 GB in" in capsys.readouterr().err
    load.load_base(HUB, NF4, CPU)
    assert "4-bit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "settings", "device"),
    [
        (HUB, replace(NF4, bnb_4bit_quant_type="fp4"), CPU),
        (HUB, replace(NF4, bnb_4bit_use_double_quant=False), CPU),
        (HUB, NF4, BFLOAT16),
        (replace(HUB, revision="1" * 40), NF4, CPU),
        (replace(HUB, name="other-org/tiny"), NF4, CPU),
        (HUB, NF4, Device(torch.device("cuda", 0), torch.float32)),
    ],
)
def test_what_is_not_exactly_the_same_is_another_copy(
    section: ModelSection, settings: QuantizationSection, device: Device, root: Path
) -> None:
    one, other = four_bit_files(HUB, NF4, CPU), four_bit_files(section, settings, device)
    assert one and other and one.folder != other.folder


def test_another_version_of_a_library_is_another_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = four_bit_files(HUB, NF4, CPU)
    monkeypatch.setattr(files, "version", lambda library: "0.0")
    other = four_bit_files(HUB, NF4, CPU)
    assert one and other and one.folder != other.folder


def test_nothing_is_kept_of_what_is_not_pinned_or_not_quantised(root: Path, tiny_model: Path) -> None:
    assert four_bit_files(replace(HUB, revision="main"), NF4, CPU) is None
    assert four_bit_files(replace(HUB, revision=None), NF4, CPU) is None
    assert four_bit_files(replace(HUB, trust_remote_code=True), NF4, CPU) is None
    assert four_bit_files(replace(HUB, name=str(tiny_model)), NF4, CPU) is None
    assert four_bit_files(HUB, QuantizationSection(load_in_4bit=False), CPU) is None
    load.load_base(HUB, QuantizationSection(load_in_4bit=False), CPU)
    assert not root.exists()


def test_nothing_is_kept_where_nobody_asks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    load.load_base(HUB, NF4, CPU)
    assert not root.exists()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def garbage(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_longer_quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def fewer_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [cut, no_weights, garbage, no_longer_quantised, fewer_tensors])
def test_a_damaged_copy_is_not_used(
    damage: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = everything(load.load_base(HUB, NF4, CPU))
    (folder,) = root.iterdir()
    damage(folder)
    capsys.readouterr()
    assert everything(load.load_base(HUB, NF4, CPU)) == first
    said = [line for line in capsys.readouterr().err.splitlines() if "4-bit" in line]
    assert (
        len(said) == 1 and "so the originals are quantised" in said[0] and f"delete four-bit/{folder.name}" in said[0]
    )


def test_a_copy_without_its_last_file_is_not_there(root: Path) -> None:
    load.load_base(HUB, NF4, CPU)
    (folder,) = root.iterdir()
    (folder / "identity.json").unlink()
    found = four_bit_files(HUB, NF4, CPU)
    assert found and found.load(HUB, CPU, {}) is None


def test_a_full_disk_costs_the_copy_and_not_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    load.load_base(HUB, NF4, CPU)
    assert "4-bit weights are not kept" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import transformers

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    load.load_base(HUB, NF4, CPU)
    assert "4-bit weights are not kept: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(root.iterdir())


def test_the_originals_are_waited_for_while_they_are_fetched(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(f"{root}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        load.load_base(HUB, NF4, CPU)
        assert time.monotonic() - began > 0.4
        assert "waiting for the original weights" in capsys.readouterr().err
        fcntl.flock(lock, fcntl.LOCK_EX)
        load.load_base(HUB, NF4, CPU)
        assert "waiting" not in capsys.readouterr().err, "the kept ones need no original"
