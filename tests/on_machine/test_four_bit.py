"""4-bit weights in the bucket: what one launch has quantised, the next one trains on, and the originals come after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import IO

import pytest

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.machine.hardware import dtype_for
from on_machine.kept import four_bit
from tests.helpers.kept_machine import Machine, flip, loads, start_of_keep
from tests.helpers.machine_fixture import ROOT
from tests.helpers.model_hub import COMMIT, NAME, model_hub

CONFIG = f"model:\n  name: {NAME}\n  revision: {COMMIT}\n  torch_dtype: auto\n"


@pytest.fixture
def kept(tmp_path: Path, tiny_model: Path) -> tuple[Path, float]:
    """A bucket that a first launch has filled, and what its weights add up to."""
    first = Machine(tmp_path / "first", tmp_path / "bucket")
    first.bucket.mkdir()
    with model_hub(tiny_model) as hub:
        keeper = start_of_keep(first)
        expected = loads(first, hub.url, four_bit=True)
    first.state("set-up.json").write_text('{"parts": {}, "facts": {}}\n')
    assert keeper.wait(60) == 0
    return first.bucket, expected


@pytest.fixture
def second(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "second", tmp_path / "bucket")
    machine.state("set-up.log").touch()
    return machine


def facts(machine: Machine) -> dict[str, str]:
    return dict(line.split()[1:] for line in machine.state("set-up.log").read_text().splitlines())


def snapshot(machine: Machine) -> Path:
    return machine.home / f".cache/huggingface/hub/models--{NAME.replace('/', '--')}/snapshots/{COMMIT}"


def test_the_next_machine_trains_on_the_same_weights(kept: tuple[Path, float], second: Machine) -> None:
    bucket, expected = kept
    assert {path.name for path in bucket.iterdir()} == {"four-bit", "models"}
    code, said = second.kept("fetch-model", bucket, "no-uv", "", CONFIG)
    assert code == 0 and f"{NAME} in 4 bits from the bucket: 0.00 GB in" in said
    assert (snapshot(second) / "model.safetensors").is_file()
    assert facts(second)["model_from"] == "bucket" and int(facts(second)["four_bit_bytes"]) > 10_000
    (snapshot(second) / "model.safetensors").unlink()
    assert loads(second, "http://127.0.0.1:9", four_bit=True) == expected, "without the originals, and without the hub"


def downloader(machine: Machine, *lines: str) -> Path:
    """A stand-in for the environment's Python, which downloads from the hub. Returns the file with what it was asked for."""
    python = machine.home / "finetune-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("\n".join(["#!/bin/sh", "shift 4", f'echo "$@" >>{machine.home}/asked', *lines, "exit 0", ""]))
    python.chmod(0o755)
    return machine.home / "asked"


def test_the_originals_come_after_training_may_begin(
    kept: tuple[Path, float], second: Machine, tiny_model: Path
) -> None:
    """They are downloaded here, and the stand-in for that waits until it may go on."""
    bucket, expected = kept
    shutil.rmtree(bucket / "models")
    go_on = second.home / "go-on"
    asked = downloader(second, f'case "$*" in *safetensors*) until [ -e {go_on} ]; do sleep 0.1; done;; esac')
    with second.state("model.lock").open("w") as training, second.state("four-bit.lock").open("w") as rest:
        flock(training, LOCK_EX)
        flock(rest, LOCK_EX)
        command = [sys.executable, "-m", "on_machine.kept", "fetch-model", str(bucket), "no-uv", "", CONFIG]
        env = second.env | {"FINETUNE_MODEL_LOCK": str(training.fileno())}
        passed = (training.fileno(), rest.fileno())
        fetch = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=passed, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while is_held(second.state("model.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert is_held(second.state("four-bit.lock")) and fetch.poll() is None
    with model_hub(tiny_model) as hub:
        assert loads(second, hub.url, four_bit=True) == expected, "training does not wait for them"
        assert not any("model.safetensors" in one for one in hub.asked)
    assert fetch.poll() is None and os.getpriority(os.PRIO_PROCESS, fetch.pid) == 19
    go_on.touch()
    assert fetch.wait(30) == 0
    assert not is_held(second.state("four-bit.lock"))
    small, all_of_it = asked.read_text().splitlines()
    assert "safetensors" not in small and "*.json" in small and "safetensors" in all_of_it


def is_held(lock: Path) -> bool:
    with lock.open("rb") as file:
        return not _locks(file)


def _locks(file: IO[bytes]) -> bool:
    try:
        flock(file, LOCK_SH | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_damaged_copy_is_not_used_and_the_originals_are(kept: tuple[Path, float], second: Machine) -> None:
    bucket, expected = kept
    (weights,) = bucket.glob("four-bit/*/*/model.safetensors")
    flip(weights)
    code, said = second.kept("fetch-model", bucket, "no-uv", "", CONFIG)
    assert code == 0 and "the bucket's 4-bit weights are not used" in said
    assert not list(second.state("four-bit").glob("*")), "never half of them"
    assert loads(second, "http://127.0.0.1:9", four_bit=True) == expected


def test_the_bucket_keeps_the_newest_two_and_writes_none_twice(kept: tuple[Path, float], tmp_path: Path) -> None:
    bucket, _ = kept
    (one,) = (bucket / "four-bit").iterdir()
    written = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    first = Machine(tmp_path / "third", bucket)
    shutil.copytree(tmp_path / "first" / ".finetune" / "four-bit", first.state("four-bit"))
    shutil.copytree(first.state("four-bit") / one.name, first.state("four-bit") / f"{'2' * 32}.part-7")
    first.state("set-up.json").write_text('{"parts": {}, "facts": {}}\n')
    assert start_of_keep(first).wait(60) == 0
    assert {path: path.stat().st_mtime_ns for path in (bucket / "four-bit").rglob("*") if path != one} == written
    for name in ("0" * 32, "1" * 32):
        shutil.move(next(first.state("four-bit").glob("*[0-9a-f]")), first.state("four-bit") / name)
        assert start_of_keep(first).wait(60) == 0
    assert {path.name for path in (bucket / "four-bit").iterdir()} == {"0" * 32, "1" * 32}


# which copy a task will ask for

IDENTITY = {
    "format": 1, "model": NAME, "revision": COMMIT, "quant_type": "nf4", "double_quant": True, "quantised_from": "bfloat16",
    "on": "cuda", "bitsandbytes": "1.2", "transformers": "3.4",
}  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with constraints.txt and an nvidia-smi that names the compute capability in the file `capability`."""
    (tmp_path / "constraints.txt").write_text("bitsandbytes==1.2\ntransformers==3.4\n")
    (tmp_path / "capability").write_text("8.9\n")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/capability\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "config", "identity", "wanted"),
    [
        ("", CONFIG, {}, True),
        ("", f"model: {{name: {NAME}, revision: {COMMIT}}}", {}, True),
        (f"model.name={NAME} model.revision={COMMIT}", "", {}, True),
        ("", CONFIG.replace(COMMIT, "main"), {}, False),
        ("", CONFIG, {"model": "other/model"}, False),
        ("", CONFIG, {"quantised_from": "float16"}, False),
        ("model.torch_dtype=float16", CONFIG, {"quantised_from": "float16"}, True),
        ("", CONFIG.replace("auto", "float16"), {"quantised_from": "float16"}, True),
        ("model.torch_dtype=bfloat16", CONFIG.replace("auto", "float16"), {}, True),
        ("", CONFIG, {"on": "cpu", "quantised_from": "float32"}, False),
        ("quantization.load_in_4bit=false", CONFIG, {}, False),
        ("", CONFIG + "quantization:\n  load_in_4bit: false\n", {}, False),
        ("", CONFIG + "quantization:\n  bnb_4bit_quant_type: fp4\n", {}, False),
        ("quantization.bnb_4bit_quant_type=fp4", CONFIG, {"quant_type": "fp4"}, True),
        ("quantization.bnb_4bit_use_double_quant=False", CONFIG, {"double_quant": False}, True),
        ("", CONFIG, {"bitsandbytes": "1.1"}, False),
        ("", CONFIG, {"transformers": "3.40"}, False),
    ],
)
def test_which_copy_is_fetched(
    overrides: str, config: str, identity: dict[str, object], wanted: bool, machine: Path
) -> None:
    assert four_bit._is_wanted({**IDENTITY, **identity}, overrides, config) is wanted


@pytest.mark.parametrize("capability", ["7.0", "7.5", "8.0", "8.9", "9.0", "10.0", "12.0"])
def test_the_gpu_decides_the_dtype_as_the_loader_does(capability: str, machine: Path) -> None:
    (machine / "capability").write_text(f"{capability}\n{capability}\n")
    major, minor = capability.split(".")
    assert four_bit._places_and_dtypes("auto") == [("cuda", dtype_for((int(major), int(minor)), "auto"))]


def test_without_a_gpu_it_is_that_of_the_cpu(machine: Path) -> None:
    (machine / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert four_bit._places_and_dtypes("auto") == [("cpu", dtype_for(None, "auto"))]


def test_where_a_cpu_is_accepted_it_may_be_either(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALLOW_CPU", "1")
    assert four_bit._places_and_dtypes("auto") == [("cuda", "bfloat16"), ("cpu", "float32")]


def test_what_a_config_leaves_out_is_as_in_the_schema() -> None:
    section = QuantizationSection()
    found = {name: str(getattr(section, name)).lower() for name in four_bit.DEFAULTS if name != "torch_dtype"}
    assert found | {"torch_dtype": ModelSection("x").torch_dtype} == four_bit.DEFAULTS
    assert json.loads(json.dumps(four_bit.DEFAULTS)) == four_bit.DEFAULTS
