"""`finetune train` on a CPU with a tiny NF4 model: the files of a finished run, and its tracking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.train_helpers import adapter_of, record_of, steps_in

torch = pytest.importorskip("torch")

from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.config.load import config_hash, load_config  # noqa: E402
from finetune.data.prompts import PromptTemplate, encode_examples, load_template  # noqa: E402
from finetune.data.records import read_records  # noqa: E402
from finetune.models.load import load_tokenizer  # noqa: E402
from finetune.runtime.files import sha256_file  # noqa: E402
from finetune.training.scratch import scratch_folders  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[2]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


# --- the files of a finished run


def test_the_record_holds_the_inputs_of_the_run(tiny_run: Path, tiny_data: Path, tiny_model: Path) -> None:
    record = record_of(tiny_run)
    config = load_config(tiny_run / "config.yaml")
    assert record["status"] == "done"
    assert record["run_name"] == tiny_run.name
    assert record["config_hash"] == config_hash(config) == config_hash(load_config(Path(record["config_file"])))
    assert record["config"]["training"]["learning_rate"] == 1e-2
    assert record["data"]["path"] == str(tiny_data)
    assert record["data"]["manifest_sha256"] == sha256_file(tiny_data / "manifest.json")
    assert record["data"]["counts"] == {"train": 24, "val": 6, "test": 6}
    assert record["data"]["used"] == {"train": 24, "val": 6}
    assert record["prompt_version"] == PromptTemplate().identity()
    assert record["seed"] == 42
    assert record["attempts"] == 1
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert record["git_commit"] == (git.stdout.strip() or None)
    assert record["python"] == sys.version.split()[0]
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        assert record["packages"][package] == metadata.version(package)
    assert record["model"]["name"] == str(tiny_model)
    assert record["model"]["quantization"] == "nf4"
    # two layers, r 4: q, k, v, o, gate, up, down of a 64-wide Llama with 2 of 4 heads for keys and values
    per_layer = 4 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + (64 + 128) + (64 + 128) + (128 + 64))
    assert record["model"]["trainable_parameters"] == 2 * per_layer
    assert record["model"]["parameters"] > 2 * per_layer + 512 * 64
    if not torch.cuda.is_available():
        assert record["hardware"]["gpu"] is None
        assert record["hardware"]["dtype"] == "float32"
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))


def test_the_record_holds_the_measurements(tiny_run: Path, tiny_data: Path) -> None:
    record = record_of(tiny_run)
    assert record["steps"] == {"done": 6, "planned": 6}
    assert record["epochs"] == 1.0
    tokenizer = load_tokenizer(load_config(tiny_run / "config.yaml").model)
    assert record["tokens"] == {"trained": sum(lengths_of(tiny_data / "train.jsonl", tokenizer))}
    assert record["tokens_per_second"] > 0
    peak = record["peak_memory_gib"]
    kind = "cuda reserved" if torch.cuda.is_available() else "process resident"
    assert peak["kind"] == kind
    assert 0.1 < peak["value"] < 64
    train_losses = [row["loss"] for row in record["history"] if "loss" in row]
    validation = [(row["step"], row["eval_loss"]) for row in record["history"] if "eval_loss" in row]
    assert steps_in(record) == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in validation] == [3, 6]
    assert record["losses"] == {
        "first": train_losses[0],
        "last": train_losses[-1],
        "eval_first": validation[0][1],
        "eval_last": validation[1][1],
    }
    assert train_losses[-1] < train_losses[0] < 7.5  # ln 512 is 6.2
    assert all(set(row) >= {"learning_rate", "grad_norm", "epoch"} for row in record["history"] if "loss" in row)
    assert [row["tokens_per_second"] is not None for row in record["history"] if "loss" in row] == [False] + [True] * 5
    assert 0 < record["wall_seconds"] < 600
    assert record["started_at"] <= record["ended_at"]
    assert record["spent_usd"] == pytest.approx(3600 * record["spending"]["hours"], abs=0.4)  # 3600 dollars an hour
    assert record["spending"]["hours"] * 3600 >= record["wall_seconds"] - 0.5, "from the start of the process"
    (attempt,) = record["attempt_log"]
    assert attempt["usd"] == pytest.approx(record["spent_usd"], abs=0.01)
    assert (attempt["from_step"], attempt["to_step"], attempt["reason"]) == (0, 6, "done")
    assert "measured hours" in record["spent_basis"]


def test_the_adapter_folder_is_self_contained(tiny_run: Path, tiny_data: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    adapter = tiny_run / "adapter"
    assert load_template(adapter) == PromptTemplate()
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    original = load_tokenizer(load_config(tiny_run / "config.yaml").model)
    text = read_records(tiny_data / "test.jsonl")[0].sql
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(bool(weight.any()) for weight in weights.values())


def test_checkpoints_verify_and_only_the_last_are_kept(tiny_run: Path) -> None:
    kept = [folder.name for folder in checkpoint_folders.newest_first(tiny_run / "checkpoints")]
    assert kept == ["step-6", "step-4"]
    assert all(
        checkpoint_folders.fault(folder) is None for folder in checkpoint_folders.newest_first(tiny_run / "checkpoints")
    )
    saves = record_of(tiny_run)["saves"]
    assert (saves["count"], saves["committed_step"]) == (3, 6)
    assert 0 < saves["stall_share"] < 1 and saves["bytes"] > 10_000


def test_a_checkpoint_holds_the_inputs_of_the_run(tiny_run: Path, tiny_data: Path) -> None:
    folder = tiny_run / "checkpoints" / "step-4"
    manifest = checkpoint_folders.read_manifest(folder)
    assert {"config.yaml", "prompt.json", "data-manifest.json", "probe.json", "ledger/attempt-001.jsonl"} <= set(
        manifest["files"]
    )
    record = record_of(tiny_run)
    assert (manifest["step"], manifest["number"], manifest["run_id"]) == (4, 2, record["run_id"])
    assert (folder / "data-manifest.json").read_bytes() == (tiny_data / "manifest.json").read_bytes()
    assert load_config(folder / "config.yaml") == load_config(tiny_run / "config.yaml")


def test_staged_saves_leave_nothing_on_the_local_disk(tiny_run: Path) -> None:
    assert scratch_folders(record_of(tiny_run)["run_id"]) == []
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == {"step-4", "step-6"}


def test_tensorboard_shows_loss_and_speed(tiny_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tiny_run / "tensorboard"))
    events.Reload()
    shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    rows = [row for row in record_of(tiny_run)["history"] if "loss" in row]
    assert shown["train/loss"] == pytest.approx({row["step"]: row["loss"] for row in rows})
    speeds = {row["step"]: row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None}
    assert shown["train/tokens_per_second"] == pytest.approx(speeds)
    assert set(shown["eval/loss"]) == {3, 6}


def test_one_seed_gives_one_adapter_and_another_seed_another(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        config = tiny_config(training={"max_steps": 2, "seed": seed}, lora={"lora_dropout": 0.1})
        assert main(["train", str(config)]) == 0
    first, again, other = (adapter_of(tmp_path / "runs" / f"tiny-00{n}") for n in (1, 2, 3))
    assert first == again
    assert first != other


def test_examples_that_do_not_fit_are_reported_and_counted(
    tiny_run: Path, tiny_data: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    tokenizer = load_tokenizer(load_config(tiny_run / "config.yaml").model)
    splits = {split: lengths_of(tiny_data / f"{split}.jsonl", tokenizer) for split in ("train", "val")}
    limit = sorted(splits["train"])[11]
    config = tiny_config(model={"max_seq_length": limit}, training={"max_steps": -1, "num_train_epochs": 1})
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr().err
    record = record_of(tmp_path / "runs" / "tiny-001")
    for split, lengths in splits.items():
        fit = [length for length in lengths if length <= limit]
        assert (
            f"{split}: {len(lengths) - len(fit)} examples are longer than model.max_seq_length={limit} tokens" in said
        )
        assert record["data"]["used"][split] == len(fit) < len(lengths)
    assert record["tokens"]["trained"] == sum(length for length in splits["train"] if length <= limit)


def lengths_of(path: Path, tokenizer: Any) -> list[int]:
    """Number of tokens of every record: prompt, answer and end-of-text token."""
    records = read_records(path)
    prompts = [PromptTemplate().render_record(record) for record in records]
    return [len(item) for item in encode_examples(tokenizer, prompts, [record.sql for record in records])]


# --- W&B


def test_weights_and_biases_stays_off_unless_asked_for(tiny_run: Path) -> None:
    assert list(tiny_run.rglob("*wandb*")) == []


def test_weights_and_biases_offline_needs_no_key_and_stays_in_the_run_folder(
    tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    config = tiny_config(training={"max_steps": 1}, tracking={"wandb": "offline", "wandb_project": "mine"})
    assert main(["train", str(config)]) == 0
    wandb.finish()  # a separate process would do so at its exit
    [folder] = (tmp_path / "runs" / "tiny-001" / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))


def test_weights_and_biases_online_without_a_key_is_refused(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    with reported("tracking.no_key"):
        assert main(["train", str(tiny_config(tracking={"wandb": "online"}))]) == 2
    message = capsys.readouterr().err
    assert message.startswith("finetune: tracking.wandb: online needs a key; set WANDB_API_KEY")
    assert message.count("\n") == 1
    assert not (tmp_path / "runs").exists()
