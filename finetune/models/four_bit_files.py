"""4-bit weights on the disk, as they were quantised once: read instead of the originals, which are nearly four times as large.

On a cloud machine the job names a folder (machine/four_bit_place.py). A model of the hub that is quantised is then written below
it, the job keeps that in the bucket (on_machine/kept/four_bit.py), and later launches find it in the same place:

<folder>/<key>/identity.json    what the weights were made of and by; the key is its hash
<folder>/<key>/                 transformers' own files of a quantised model: config.json, model*.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.errors import UserError, first_line
from finetune.machine.four_bit_place import lock_of, named_place
from finetune.models.device import Device
from finetune.models.source import load_with
from finetune.runtime.console import say
from finetune.runtime.locks import is_locked, wait_while_locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDENTITY = "identity.json"
FORMAT = 1
LIBRARIES = ("bitsandbytes", "transformers")
"""Whose versions decide what is quantised and how it is written."""
COMMIT_LETTERS = 40
SHARD = "1GB"
LEFT_BYTES = 4 * 2**30
"""Of the disk and of memory, beside what is written: for checkpoints, and for training."""
WAIT_SECONDS = 1800.0
"""For originals that are being fetched; after that they are downloaded."""


@dataclass(frozen=True)
class FourBitFiles:
    """The place of one model's 4-bit weights. identity: see `four_bit_files`."""

    folder: Path
    identity: dict[str, Any]

    def load(self, section: ModelSection, device: Device, arguments: dict[str, Any]) -> PreTrainedModel | None:
        """The model, bit for bit as quantising the originals gives it (tests/models/test_four_bit_files.py). None if it is not
        there, or cannot be read, which one line says. arguments: for from_pretrained."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if not (self.folder / IDENTITY).is_file():
            return None
        source = str(self.folder)
        try:
            config = load_with(AutoConfig.from_pretrained, section, source)
            config.quantization_config["bnb_4bit_compute_dtype"] = device.dtype_name
            load = AutoModelForCausalLM.from_pretrained
            model, info = load_with(load, section, source, config=config, output_loading_info=True, **arguments)
            if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
                raise ValueError(f"other tensors than the model has, such as {wrong[0]}")
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            say(f"{source}: these 4-bit weights cannot be read, so the originals are quantised: {first_line(error)}; delete "
                f"four-bit/{self.folder.name} in the bucket to have them made anew")  # fmt: skip
            return None
        model.name_or_path = model.config._name_or_path = section.name  # as adapters name it
        found: PreTrainedModel = model
        return found

    def write(self, model: PreTrainedModel) -> None:
        """Write a model that has just been quantised. Without it the run is the same, so what fails is only reported."""
        if self.folder.exists():
            return
        part = self.folder.with_name(f"{self.folder.name}.part-{os.getpid()}")
        began, most = time.monotonic(), _most_bytes(model)
        try:
            part.mkdir(parents=True)
            if shutil.disk_usage(part).free < most + LEFT_BYTES:
                say(f"4-bit weights are not kept: {part.parent} has less than {(most + LEFT_BYTES) / 1e9:.1f} GB free")
                return
            model.save_pretrained(part, max_shard_size=SHARD)
            (part / IDENTITY).write_text(f"{json.dumps(self.identity, indent=1)}\n", encoding="utf-8")
            size = sum(path.stat().st_size for path in part.iterdir())
            part.rename(self.folder)
        except (OSError, RuntimeError, ValueError) as error:
            say(f"4-bit weights are not kept: {first_line(error)}")
            return
        finally:
            shutil.rmtree(part, ignore_errors=True)
        say(f"4-bit weights kept for later launches: {size / 1e9:.2f} GB in {time.monotonic() - began:.1f} s")


def four_bit_files(section: ModelSection, quantization: QuantizationSection, device: Device) -> FourBitFiles | None:
    """Where the 4-bit weights of this model are, or belong. None where none are kept: without the variable, for weights of 16
    bits, for a model that is no pinned one of the hub, and for one with code of its own."""
    root = named_place()
    if root is None or not quantization.load_in_4bit or section.trust_remote_code or Path(section.name).exists():
        return None
    if section.name.count("/") != 1 or len(section.revision or "") != COMMIT_LETTERS:
        return None
    identity = {
        "format": FORMAT,
        "model": section.name,
        "revision": section.revision,
        "quant_type": quantization.bnb_4bit_quant_type,
        "double_quant": quantization.bnb_4bit_use_double_quant,
        "quantised_from": str(device.quantized_in or device.dtype).removeprefix("torch."),
        "on": device.place.type,
        **{library: version(library) for library in LIBRARIES},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return FourBitFiles(root / key, identity)


def wait_for_originals() -> None:
    """While set-up still fetches the original weights of the model, which it does after the 4-bit ones."""
    root = named_place()
    if root is not None and is_locked(lock := lock_of(root)):
        say("waiting for the original weights of the model, which are being fetched")
        wait_while_locked(lock, WAIT_SECONDS)


def _most_bytes(model: PreTrainedModel) -> int:
    """Of the parameters, with the scales of the 4-bit ones, which add an eighth at most."""
    return sum(int(one.numel() * one.element_size() * 1.125) for one in model.parameters())
