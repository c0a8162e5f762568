"""`finetune train` itself, on a CPU with a tiny NF4 model: what a run leaves, and how it begins, stops and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from data_examples import files_of

torch = pytest.importorskip("torch")

from finetune import checkpoint, train  # noqa: E402
from finetune.callbacks import Throughput  # noqa: E402
from finetune.cli import main  # noqa: E402
from finetune.config import TrackingSection, config_hash, load_config  # noqa: E402
from finetune.files import sha256_file  # noqa: E402
from finetune.model import load_tokenizer  # noqa: E402
from finetune.prompts import PromptTemplate, encode_examples, load_template  # noqa: E402
from finetune.records import read_records  # noqa: E402
from finetune.runs import open_run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key of the person who runs the tests, and no variable of one run left for the next."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no-netrc")
    yield
    os.environ.clear()
    os.environ.update(before)


def record_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "run.json").read_text())
    return value


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_in(record: dict[str, Any]) -> list[int]:
    return [row["step"] for row in record["history"] if "loss" in row]


def at_step(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of a training step."""
    original = Throughput.on_step_begin

    def wrapped(self: Throughput, args: Any, state: Any, control: Any, **others: Any) -> None:
        original(self, args, state, control, **others)
        if state.global_step == step - 1:
            action()

    monkeypatch.setattr(Throughput, "on_step_begin", wrapped)


# --- what a finished run leaves


def test_the_record_tells_what_the_run_was_made_of(tiny_run: Path, tiny_data: Path, tiny_model: Path) -> None:
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


def test_the_record_tells_what_was_measured(tiny_run: Path, tiny_data: Path, tiny_model: Path) -> None:
    record = record_of(tiny_run)
    assert record["steps"] == {"done": 6, "planned": 6}
    assert record["epochs"] == 1.0
    examples = read_records(tiny_data / "train.jsonl")
    tokenizer = load_tokenizer(load_config(tiny_run / "config.yaml").model)
    prompts = [PromptTemplate().render_record(example) for example in examples]
    encoded = encode_examples(tokenizer, prompts, [example.sql for example in examples])
    assert record["tokens"] == {"trained": sum(len(item.input_ids) for item in encoded)}
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
    assert record["spent_usd"] == pytest.approx(record["wall_seconds"], abs=0.06)  # 3600 dollars an hour
    assert "measured hours" in record["spent_basis"]


def test_the_adapter_folder_is_complete_in_itself(tiny_run: Path, tiny_data: Path) -> None:
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
    kept = [folder.name for folder in checkpoint.newest_first(tiny_run / "checkpoints")]
    assert kept == ["step-6", "step-4"]
    assert checkpoint.latest_valid(tiny_run / "checkpoints") == (tiny_run / "checkpoints" / "step-6", [])
    assert list((tiny_run / "checkpoints").glob("checkpoint-*")) == []


def test_tensorboard_shows_loss_and_speed(tiny_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_examples_that_do_not_fit_are_told_and_counted(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    counts = {}
    for limit in (256, 60):
        assert main(["train", str(tiny_config(model={"max_seq_length": limit}, training={"max_steps": 1}))]) in (0, 2)
        counts[limit] = capsys.readouterr().err
    lengths = sorted(json.loads((tmp_path / "runs" / "tiny-001" / "run.json").read_text())["data"]["used"].items())
    assert lengths == [("train", 24), ("val", 6)]
    assert "left out" not in counts[256]


# --- W&B


def test_weights_and_biases_stays_off_unless_asked_for(tiny_run: Path) -> None:
    assert list(tiny_run.rglob("*wandb*")) == []


def test_weights_and_biases_offline_needs_no_key_and_stays_in_the_run_folder(
    tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    config = tiny_config(training={"max_steps": 1}, tracking={"wandb": "offline", "wandb_project": "mine"})
    assert main(["train", str(config)]) == 0
    [folder] = (tmp_path / "runs" / "tiny-001" / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))


def test_weights_and_biases_online_without_a_key_is_refused(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    assert main(["train", str(tiny_config(tracking={"wandb": "online"}))]) == 2
    message = capsys.readouterr().err
    assert message.startswith("finetune: tracking.wandb: online needs a key; set WANDB_API_KEY")
    assert message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("wanted", "key", "services", "mode"),
    [
        ("auto", False, ["tensorboard"], None),
        ("auto", True, ["tensorboard", "wandb"], "online"),
        ("online", True, ["tensorboard", "wandb"], "online"),
        ("offline", False, ["tensorboard", "wandb"], "offline"),
        ("offline", True, ["tensorboard", "wandb"], "offline"),
        ("disabled", True, ["tensorboard"], None),
    ],
)
def test_where_a_run_reports_to(wanted: Any, key: bool, services: list[str], mode: str | None, tiny_run: Path) -> None:
    if key:
        os.environ["WANDB_API_KEY"] = "x" * 40
    tracking = TrackingSection(wandb=wanted, wandb_project="mine")
    session: Any = SimpleNamespace(
        run=open_run(tiny_run), inputs=SimpleNamespace(config=SimpleNamespace(tracking=tracking))
    )
    assert train._report_to(session) == services
    assert os.environ.get("WANDB_MODE") == mode
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tiny_run / "tensorboard")
    if mode:
        assert (os.environ["WANDB_DIR"], os.environ["WANDB_PROJECT"]) == (str(tiny_run), "mine")


# --- interrupted and resumed

LONG = {"max_steps": 40, "max_grad_norm": 0.5}


def start_and_wait(config: Path, until: Callable[[], bool]) -> subprocess.Popen[str]:
    """`finetune train` in a process of its own, returned as soon as `until` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "train", str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def uninterrupted(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert main(["train", str(write_config(folder, training=LONG, checkpoint={"save_steps": 100}))]) == 0
    return folder / "runs" / "tiny-001"


def test_ctrl_c_ends_with_a_checkpoint_and_resume_goes_on_from_it(
    uninterrupted: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training=LONG, checkpoint={"save_steps": 100})
    run = tmp_path / "runs" / "tiny-001"
    process = start_and_wait(config, lambda: (run / "run.json").is_file() and len(record_of(run)["history"]) > 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGINT: finishing this step, then saving a checkpoint" in said
    assert f"interrupted, a checkpoint is saved; go on with `finetune train --resume {run}`" in said
    assert "Traceback" not in said
    first = record_of(run)
    stopped_at = first["steps"]["done"]
    assert first["status"] == "interrupted"
    assert first["ended_at"] is not None
    assert 3 <= stopped_at < 40
    assert steps_in(first) == list(range(1, stopped_at + 1))
    assert checkpoint.latest_valid(run / "checkpoints") == (run / "checkpoints" / f"step-{stopped_at}", [])
    assert not (run / "adapter").exists()

    assert main(["train", "--resume", str(run)]) == 0
    assert f"resuming from {run / 'checkpoints' / f'step-{stopped_at}'}" in capsys.readouterr().err
    record, whole = record_of(run), record_of(uninterrupted)
    assert record["status"] == "done"
    assert record["attempts"] == 2
    assert record["steps"] == {"done": 40, "planned": 40}
    assert steps_in(record) == list(range(1, 41))
    assert record["history"][:stopped_at] == first["history"]
    assert record["wall_seconds"] > first["wall_seconds"]
    assert record["started_at"] == first["started_at"]
    for ours, theirs in zip(record["history"], whole["history"], strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_sigterm_saves_at_the_end_of_the_step_in_which_it_comes(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"max_steps": 5}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched:
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config)]) == 75
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-3"]
    assert main(["train", "--resume", str(run)]) == 0
    assert record_of(run)["tokens"] == record_of(whole)["tokens"]
    assert adapter_of(run) == adapter_of(whole)  # within one epoch, resume is exact


def test_a_second_ctrl_c_exits_at_once_and_leaves_no_half_of_a_save(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        at_step(4, twice, patched)
        assert main(["train", str(tiny_config(training={"max_steps": 5}))]) == 75
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-2"]
    assert main(["train", "--resume", str(run)]) == 0
    assert steps_in(record_of(run)) == [1, 2, 3, 4, 5]


def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 30})
    run = tmp_path / "runs" / "tiny-001"
    checkpoints = run / "checkpoints"
    process = start_and_wait(config, lambda: (checkpoints / "step-6" / "manifest.json").is_file())
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert record_of(run)["status"] == "running"
    checkpoint.remove_leftovers(checkpoints)
    newest, older = list(checkpoint.newest_first(checkpoints))[:2]
    size = (newest / "adapter_model.safetensors").stat().st_size
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a copy that was cut off
    for name in ("step-99", "checkpoint-99"):  # a save that was cut off
        shutil.copytree(older, checkpoints / name)
        (checkpoints / name / "manifest.json").unlink()

    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"passed over {newest}: adapter_model.safetensors has {size - 1} bytes instead of {size}" in said
    assert f"passed over {checkpoints / 'step-99'}: no manifest: the save was cut off" in said
    assert f"resuming from {older}" in said
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == list(range(1, 31))
    names = {path.name for path in checkpoints.iterdir() if path.is_dir()}
    assert names == {f"damaged-{newest.name}", "step-28", "step-30"}
    assert checkpoint.latest_valid(checkpoints) == (checkpoints / "step-30", [])


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def fault() -> None:
        raise RuntimeError("the machine is on fire")

    config = tiny_config(training={"max_steps": 4})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="on fire"):
        at_step(2, fault, patched)
        main(["train", str(config)])
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "failed"
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert f"{run}: no checkpoint to go on from, starting from the beginning" in capsys.readouterr().err
    assert steps_in(record_of(run)) == [1, 2, 3, 4]
    assert adapter_of(run) == adapter_of(whole)


def test_a_run_killed_after_its_last_checkpoint_only_saves_its_adapter(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "adapter")
    before = record_of(tiny_run)
    (run / "run.json").write_text(json.dumps(before | {"status": "running"}))
    assert main(["train", "--resume", str(run)]) == 0
    after = record_of(run)
    assert adapter_of(run) == adapter_of(tiny_run)
    assert after["status"] == "done"
    for key in ("history", "steps", "tokens", "losses", "tokens_per_second"):
        assert after[key] == before[key]
    assert after["peak_memory_gib"]["value"] >= before["peak_memory_gib"]["value"]


# --- budget


def test_a_run_stops_at_its_hours_and_goes_on_when_they_are_raised(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(budget={"max_hours": 1e-6, "usd_per_hour": 36.0}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny-001"
    stopped = record_of(run)
    assert (stopped["status"], stopped["steps"]) == ("budget_stop", {"done": 1, "planned": 4})
    assert stopped["spent_usd"] == pytest.approx(stopped["wall_seconds"] * 36 / 3600, abs=0.001)
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-1"]
    first_adapter = adapter_of(run)
    capsys.readouterr()

    assert main(["train", "--resume", str(run)]) == 2  # the budget holds over all attempts
    assert f"the budget of this run is used up; raise budget.max_hours or budget.max_run_usd in {run}/config.yaml" in (
        capsys.readouterr().err
    )
    assert record_of(run) == stopped

    change(run / "config.yaml", "budget", max_hours=1.0)
    assert main(["train", "--resume", str(run)]) == 0
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == [1, 2, 3, 4]
    assert record["config"]["budget"]["max_hours"] == 1.0
    assert record["config_hash"] == config_hash(load_config(run / "config.yaml")) != stopped["config_hash"]
    assert record["wall_seconds"] > stopped["wall_seconds"]
    assert record["spent_usd"] == pytest.approx(record["wall_seconds"] * 36 / 3600, abs=0.001)
    assert adapter_of(run) != first_adapter


def change(path: Path, section: str, **values: Any) -> None:
    tree = yaml.safe_load(path.read_text())
    tree[section] |= values
    path.write_text(yaml.safe_dump(tree))


def test_a_run_stops_at_its_dollars(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    config = tiny_config(budget={"max_run_usd": 0.01, "usd_per_hour": 36000.0})  # a millisecond
    assert main(["train", str(config)]) == 0
    assert record_of(tmp_path / "runs" / "tiny-001")["status"] == "budget_stop"


def test_a_run_without_a_price_reports_no_dollars(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    assert main(["train", str(tiny_config(training={"max_steps": 1}))]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert (record["spent_usd"], record["spent_basis"]) == (None, None)


# --- what is refused: exit code 2, one line, nothing left behind


def refused(arguments: list[str], message: str, shown: Shown) -> str:
    shown.readouterr()
    assert main(arguments) == 2
    output = shown.readouterr()
    assert output.out == ""
    ours = [line for line in output.err.splitlines() if line.startswith("finetune: ")]
    assert output.err.rstrip("\n").endswith(ours[-1])
    assert len(ours) == 1
    assert re.search(message, ours[0]), ours[0]
    return output.err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rat": 1}}, r"tiny\.yaml: unknown key training\.learning_rat \(did you mean training\.learning"),
        ({"lora": {"target_modules": ["q_proj", "query", "key"]}},
         r"lora\.target_modules: query, key match nothing in this model; its linear layers are .*down_proj.*q_proj"),
        ({"model": {"name": "no/such/folder"}}, r"model\.name: no folder no/such/folder; expected a local folder, a hub id"),
        ({"model": {"name": "mistralai/Mistral-7B-v0.1"}}, r"model\.revision: a hub model needs a pinned revision"),
        ({"model": {"name": "package://no_such_package/x.gguf"}}, r"model\.name: .*no_such_package"),
        ({"model": {"torch_dtype": "float16"}}, r"model\.torch_dtype: float16 does not train on a CPU; use auto"),
        ({"model": {"max_seq_length": 20}}, r"model\.max_seq_length: no training example fits into 20 tokens"),
        ({"training": {"optim": "paged_adamw_8bit"}},
         r"training\.optim: paged_adamw_8bit needs a GPU; on a CPU use training\.optim=adamw_torch"),
        ({"data": {"output_dir": "nowhere/prepared"}},
         r"nowhere/prepared/manifest\.json: missing; run `finetune data prepare CONFIG` first"),
        ({"data": {"schema_format": "compact"}},
         r"prepared: was prepared for prompt 1-ddl-\w+, this config renders 1-compact-\w+; run `finetune data prepare"),
        ({"training": {"run_name": "../up"}}, r"training\.run_name: expected a plain folder name"),
    ],
)  # fmt: skip
def test_what_no_run_can_begin_with_is_refused(
    sections: dict[str, Any], message: str, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    if torch.cuda.is_available() and ("optim" in message or "float16" in message):
        pytest.skip("a mistake on a CPU only")
    refused(["train", str(tiny_config(**sections))], message, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (["config.json", "tokenizer.json", "tokenizer_config.json"], r"model\.name: .*broken holds no weights"),
        (["model.safetensors", "tokenizer.json"], r"model\.name: .*broken holds no config\.json"),
        (["config.json", "model.safetensors"], r"model\.name: cannot load .*broken.*is the folder complete"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused(
    kept: list[str], message: str, tiny_model: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    (tmp_path / "broken").mkdir()
    for name in kept:
        shutil.copy(tiny_model / name, tmp_path / "broken")
    refused(["train", str(tiny_config(model={"name": str(tmp_path / "broken")}))], message, capsys)
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_cut_off_are_refused(
    tiny_model: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = tiny_config(model={"name": str(tmp_path / "broken")})
    refused(["train", str(config)], r"model\.name: cannot load .*broken", capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("train.jsonl", lambda path: path.write_bytes(path.read_bytes() + b"\n"), r"train\.jsonl: changed since it was prep"),
        ("val.jsonl", lambda path: path.unlink(), r"val\.jsonl: missing, though manifest\.json lists it"),
        ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json: not readable as JSON"),
    ],
)  # fmt: skip
def test_data_that_is_not_as_prepared_is_refused(
    name: str, harm: Callable[[Path], object], message: str, tiny_data: Path, tiny_config: ConfigWriter, tmp_path: Path,
    capsys: Shown,
) -> None:  # fmt: skip
    shutil.copytree(tiny_data, tmp_path / "prepared")
    harm(tmp_path / "prepared" / name)
    config = tiny_config(data={"output_dir": str(tmp_path / "prepared")})
    refused(["train", str(config)], message + ".*; run `finetune data prepare CONFIG` again", capsys)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_never_overwritten(tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown) -> None:
    config = tiny_config(training={"run_name": "mine", "max_steps": 1})
    assert main(["train", str(config)]) == 0
    before = files_of(tmp_path / "runs")
    refused(["train", str(config)], r"runs/mine: is there already, and a run is never overwritten", capsys)
    assert files_of(tmp_path / "runs") == before
    for expected in ("tiny-001", "tiny-002"):
        assert main(["train", str(config), "training.run_name=null"]) == 0
        assert (tmp_path / "runs" / expected / "adapter").is_dir()
    assert {name: content for name, content in files_of(tmp_path / "runs").items() if name.startswith("mine")} == before


def test_what_cannot_be_resumed_is_refused(tiny_run: Path, tmp_path: Path, capsys: Shown) -> None:
    before = files_of(tiny_run)
    refused(["train", "--resume", str(tiny_run)], r"this run is done; start a new one, or score it", capsys)
    refused(["train", "--resume", str(tiny_run.parent)], r"runs: not a run folder \(no config\.yaml in it\)", capsys)
    refused(["train", "--resume", str(tiny_run / "x")], r"x: not a run folder", capsys)
    refused(["train", "--resume", str(tiny_run), "lora.r=8"], r"--resume takes the config in the run folder", capsys)
    assert files_of(tiny_run) == before


def test_a_run_whose_config_or_data_changed_is_not_resumed(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: Shown
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    config = (run / "config.yaml").read_text()
    before = files_of(run)
    change(run / "config.yaml", "training", learning_rate=2e-2)
    refused(["train", "--resume", str(run)], r"step-6: was made under another config; restore config\.yaml", capsys)
    (run / "config.yaml").write_text(config)
    shutil.copytree(tiny_data, tmp_path / "prepared")
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest, indent=3))
    change(run / "config.yaml", "data", output_dir=str(tmp_path / "prepared"))
    refused(["train", "--resume", str(run)], r"step-6: was trained on other data; prepare the same data again", capsys)
    (run / "config.yaml").write_text(config)
    assert files_of(run) == before


# --- disks that are full or cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """small_disk("size=300k") is a folder on a file system of its own, where the tests run as root."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 60, 160, 260, 420])
def test_a_full_disk_is_told_in_one_line(
    kilobytes: int, small_disk: Callable[..., Path], tiny_config: ConfigWriter, capsys: Shown
) -> None:
    disk = small_disk(f"size={kilobytes}k")
    config = tiny_config(training={"output_dir": str(disk / "runs")})
    said = refused(
        ["train", str(config)], rf"{disk}/.*: no space left on the disk; free some or choose another", capsys
    )
    for run in (disk / "runs").iterdir():
        assert record_of(run)["status"] == "failed" or f"{run / 'run.json'}: no space left" in said
        assert not (run / "adapter").exists()
        assert list(run.rglob("checkpoint-*")) == []
        assert all(checkpoint.fault(folder) is None for folder in checkpoint.newest_first(run / "checkpoints"))


def test_an_output_folder_that_cannot_be_written_is_refused(
    small_disk: Callable[..., Path], tiny_config: ConfigWriter, capsys: Shown
) -> None:
    disk = small_disk("ro")
    config = tiny_config(training={"output_dir": str(disk / "runs")})
    refused(["train", str(config)], r"disk0/runs: not writable \(.*\); choose another output folder", capsys)
    assert list(disk.iterdir()) == []
