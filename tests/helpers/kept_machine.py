"""A cloud machine's home folder with the programs of on_machine/kept, and a loader of models in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.machine_fixture import ROOT
from tests.helpers.model_hub import COMMIT, NAME

NOT_THERE, DAMAGED = 1, 3
TREE, KEY = "finetune-env", "0" * 32


class Machine:
    """A home folder, and the programs of on_machine/kept as a system's Python runs them."""

    def __init__(self, home: Path, bucket: Path) -> None:
        self.home, self.bucket = home, bucket
        (home / ".finetune").mkdir(parents=True)
        self.env = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def kept(self, *words: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "on_machine.kept", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    @property
    def packages(self) -> Path:
        return self.bucket / "packages" / KEY

    def state(self, name: str) -> Path:
        return self.home / ".finetune" / name


LOADS = """
import sys, torch
from finetune.config.schema import ModelSection, QuantizationSection
from finetune.models.device import choose_device
from finetune.models.load import load_base, load_model_config, load_tokenizer
section = ModelSection(name=sys.argv[1], revision=sys.argv[2])
load_model_config(section), load_tokenizer(section)
model = load_base(section, QuantizationSection(load_in_4bit=len(sys.argv) > 3), choose_device("float32"))
print(float(model(torch.arange(1, 30).unsqueeze(0)).logits.double().abs().sum()))
"""


def loads(machine: Machine, url: str, *, four_bit: bool = False) -> float:
    """The sum of the logits of the model, loaded as a job's trainer loads it. url: of the hub."""
    env = machine.env | {
        "HF_ENDPOINT": url,
        "OMP_NUM_THREADS": "1",
        "FINETUNE_FOUR_BIT": str(machine.state("four-bit")),
    }
    command = [sys.executable, "-c", LOADS, NAME, COMMIT, *(["4"] if four_bit else [])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split()[-1])


def start_of_keep(machine: Machine) -> subprocess.Popen[bytes]:
    """The process that waits for the first step, of a job that is this test."""
    about = {"pid": os.getpid(), "model": NAME, "revision": COMMIT, "record": "tiny.jsonl"}
    command = [sys.executable, "-m", "on_machine.kept", "keep", str(machine.bucket), json.dumps(about)]
    return subprocess.Popen(command, cwd=ROOT, env=machine.env)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
