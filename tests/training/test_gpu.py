"""On a CUDA machine: the real command trains the Mistral-7B shape in NF4, in bfloat16 and in float16.

Weights are random (none can be downloaded in CI), so these hold speed, memory and stability, not quality.
Run with `pytest -m gpu -s`; FINETUNE_GPU_SCRATCH names a folder with 20 GiB for the weights.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("FINETUNE_GPU_SCRATCH")
    return Path(given) if given else tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def overrides(scratch: Path) -> list[str]:
    """A random Mistral-7B folder and the small data set prepared for it."""
    subprocess.run([sys.executable, "data/build.py"], cwd=ROOT, check=True)
    run("benchmarks.random_model", "mistral-7b", str(scratch / "mistral"), "--corpus", "data/built/train.jsonl")
    values = [
        f"model.name={scratch / 'mistral'}",
        "model.revision=null",
        f"data.output_dir={scratch / 'prepared'}",
        f"training.output_dir={scratch / 'runs'}",
        f"training.max_steps={STEPS}",
        "training.logging_steps=1",
        "training.eval_steps=0",
        "checkpoint.save_steps=10",
    ]
    run("finetune", "data", "prepare", "configs/mistral_7b_quick.yaml", *values)
    return values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_twenty_steps_of_mistral_7b_in_nf4(dtype: str, scratch: Path, overrides: list[str]) -> None:
    name = f"mistral-{dtype}"
    run("finetune", "train", "configs/mistral_7b_quick.yaml", *overrides,
        f"model.torch_dtype={dtype}", f"training.run_name={name}")  # fmt: skip
    record: dict[str, Any] = json.loads((scratch / "runs" / name / "run.json").read_text())
    assert record["status"] == "done"
    assert record["steps"]["done"] == STEPS
    assert record["model"]["trainable_parameters"] == 41_943_040
    assert record["hardware"]["dtype"] == dtype
    losses = [row["loss"] for row in record["history"]]
    assert all(loss is not None for loss in losses), losses
    assert losses[-1] < losses[0]
    print(f"\n{name}: {record['tokens_per_second']:.0f} tokens/s, {record['peak_memory_gib']}, "
          f"losses {losses[0]:.3f} -> {losses[-1]:.3f}")  # fmt: skip


def test_interrupted_on_the_gpu_and_resumed(scratch: Path, overrides: list[str]) -> None:
    run_folder = scratch / "runs" / "interrupted"
    command = [sys.executable, "-m", "finetune", "train", "configs/mistral_7b_quick.yaml", *overrides]
    command += [f"training.run_name={run_folder.name}", "training.max_steps=12"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and steps_done(run_folder) < 3:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 75
    stopped = steps_done(run_folder)
    run("finetune", "train", "--resume", str(run_folder))
    record = json.loads((run_folder / "run.json").read_text())
    assert record["status"] == "done"
    assert record["attempts"] == 2
    assert [row["step"] for row in record["history"]] == list(range(1, 13))
    print(f"\ninterrupted after step {stopped}, resumed: losses {[round(row['loss'], 2) for row in record['history']]}")


def steps_done(run_folder: Path) -> int:
    try:
        record = json.loads((run_folder / "run.json").read_text())
    except FileNotFoundError:
        return 0
    return int(record.get("steps", {}).get("done", 0))


def test_evaluation_and_report_on_the_gpu(scratch: Path, overrides: list[str]) -> None:
    """A model with random weights answers nothing correctly; the test checks that every question gets a verdict."""
    folder = scratch / "runs" / "evaluated"
    few = ["evaluation.max_questions=24", "evaluation.max_new_tokens=32"]
    run("finetune", "train", "configs/mistral_7b_quick.yaml", *overrides, *few,
        "training.max_steps=2", f"training.run_name={folder.name}")  # fmt: skip
    run("finetune", "evaluate", str(folder))
    run("finetune", "report", str(folder))
    scores = json.loads((folder / "eval.json").read_text())["models"]
    assert {name: sum(score["verdicts"].values()) for name, score in scores.items()} == {"base": 24, "tuned": 24}
    print(f"\nevaluation: {[(name, score['seconds'], score['new_tokens']) for name, score in scores.items()]}")
