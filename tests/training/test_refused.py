"""What `finetune train` refuses: exit code 2, one line that names file or key, nothing left behind."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data_examples import files_of
from tests.helpers.errors import reported
from tests.helpers.train_helpers import at_step, change, record_of

torch = pytest.importorskip("torch")

from safetensors import SafetensorError  # noqa: E402

from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.runtime import fault_injection  # noqa: E402
from finetune.training import run as training_run  # noqa: E402
from finetune.training.staging import LABELS  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


def refused(arguments: list[str], code: str, shown: Shown, match: str = "") -> str:
    shown.readouterr()
    with reported(code):
        assert main(arguments) == 2
    output = shown.readouterr()
    assert output.out == ""
    ours = [line for line in output.err.splitlines() if line.startswith("finetune: ")]
    assert output.err.rstrip("\n").endswith(ours[-1])
    assert len(ours) == 1
    assert re.search(match, ours[0]), ours[0]
    return output.err


@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({"training": {"learning_rat": 1}}, "config.unknown_key", r"tiny\.yaml: .*training\.learning_rat"),
        ({"lora": {"target_modules": ["q_proj", "query", "key"]}}, "lora.unknown_modules", "query, key"),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "config.bad_value", "lm_head gets no adapter"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, "config.bad_value", "embed_tokens gets no adapter"),
        ({"lora": {"target_modules": ["model.layers.0.mlp.up_proj", "0"]}}, "lora.unknown_modules", "0 match nothing"),
        ({"model": {"name": "no/such/folder"}}, "model.not_found", r"model\.name: .*no/such/folder"),
        ({"model": {"name": "mistralai/Mistral-7B-v0.1"}}, "model.no_revision", r"model\.revision"),
        ({"model": {"name": "package://no_such_package/x.gguf"}}, "install.missing_package", r"model\.name: .*no_such_package"),
        ({"model": {"torch_dtype": "float16"}}, "model.bad_dtype", r"model\.torch_dtype: float16 does not train on a CPU"),
        ({"model": {"max_seq_length": 20}}, "data.too_long", r"model\.max_seq_length: no training example fits into 20 tokens"),
        ({"training": {"optim": "paged_adamw_8bit"}}, "training.optim_needs_gpu",
         r"training\.optim: paged_adamw_8bit needs a GPU; on a CPU use training\.optim=adamw_torch"),
        ({"data": {"output_dir": "nowhere/prepared"}}, "file.missing",
         r"nowhere/prepared/manifest\.json.*`finetune data prepare CONFIG`"),
        ({"data": {"schema_format": "compact"}}, "prompt.mismatch",
         r"prepared: was prepared for prompt 1-ddl-\w+, but this config uses 1-compact-\w+; run `finetune data prepare"),
        ({"data": {"max_train_records": 4, "val_fraction": 0.3}}, "data.other_settings",
         r"prepared: was prepared with data\.val_fraction 0\.2, this config has 0\.3; with data\.max_train_records null, this "
         r"config has 4; run `finetune data prepare CONFIG` with"),
        ({"training": {"effective_batch_size": 7}}, "config.conflicting_values", r"training\.effective_batch_size: 7 is not 4"),
        ({"training": {"run_name": "../up"}}, "config.bad_value", r"training\.run_name"),
    ],
)  # fmt: skip
def test_invalid_inputs_are_refused(
    sections: dict[str, Any], code: str, message: str, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    if torch.cuda.is_available() and ("optim" in message or "float16" in message):
        pytest.skip("a mistake on a CPU only")
    refused(["train", str(tiny_config(**sections))], code, capsys, message)
    assert not (tmp_path / "runs").exists()


def test_data_of_other_sources_are_refused(tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown) -> None:
    """run.json and the model card would name sources that training never saw."""
    config = str(tiny_config())
    for command in ("train", "evaluate"):
        refused(
            [command, config, "data.sources=[{kind: jsonl, path: others.jsonl}]"], "data.other_settings", capsys,
            r"data\.sources\[0\]\.path '.*records\.jsonl', this config has 'others\.jsonl'",
        )  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_run_that_begins_again_without_a_checkpoint_trains_on_what_its_config_says(
    tiny_run: Path, tmp_path: Path, capsys: Shown
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    change(run / "config.yaml", "data", max_train_records=4)
    message = r"was prepared with data\.max_train_records null, this config has 4"
    refused(["train", "--resume", str(run)], "data.other_settings", capsys, message)


@pytest.mark.parametrize(
    ("kept", "code"),
    [
        (["config.json", "tokenizer.json", "tokenizer_config.json"], "model.incomplete"),
        (["model.safetensors", "tokenizer.json"], "model.incomplete"),
        (["config.json", "model.safetensors"], "model.load_failed"),
    ],
)
def test_an_incomplete_model_folder_is_refused(
    kept: list[str], code: str, tiny_model: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    (tmp_path / "broken").mkdir()
    for name in kept:
        shutil.copy(tiny_model / name, tmp_path / "broken")
    refused(
        ["train", str(tiny_config(model={"name": str(tmp_path / "broken")}))], code, capsys, r"model\.name: .*broken"
    )
    assert not (tmp_path / "runs").exists()


def test_a_step_that_cannot_be_planned_leaves_no_run(
    tiny_model: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    """The corrected command may have the same run_name."""
    shutil.copytree(tiny_model, tmp_path / "gelu")
    values = json.loads((tmp_path / "gelu" / "config.json").read_text())
    (tmp_path / "gelu" / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu"}))
    config = str(tiny_config(model={"name": str(tmp_path / "gelu")}, training={"run_name": "one", "max_steps": 1}))
    refused(["train", config, "training.kernels=fused"], "model.unsupported_kernels", capsys, "activation is gelu")
    assert not (tmp_path / "runs").exists()
    assert main(["train", config]) == 0


def test_truncated_weights_are_refused(
    tiny_model: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = tiny_config(model={"name": str(tmp_path / "broken")})
    refused(["train", str(config)], "model.load_failed", capsys, r"model\.name: .*broken")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "harm", "code"),
    [
        ("train.jsonl", lambda path: path.write_bytes(path.read_bytes() + b"\n"), "data.changed"),
        ("val.jsonl", lambda path: path.unlink(), "data.changed"),
        ("manifest.json", lambda path: path.write_text("{"), "file.bad_json"),
    ],
)
def test_data_that_changed_since_it_was_prepared_is_refused(
    name: str, harm: Callable[[Path], object], code: str, tiny_data: Path, tiny_config: ConfigWriter, tmp_path: Path,
    capsys: Shown,
) -> None:  # fmt: skip
    shutil.copytree(tiny_data, tmp_path / "prepared")
    harm(tmp_path / "prepared" / name)
    config = tiny_config(data={"output_dir": str(tmp_path / "prepared")})
    refused(["train", str(config)], code, capsys, f"{name}: .*; run `finetune data prepare CONFIG` again")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_never_overwritten(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    config = tiny_config(training={"run_name": "mine", "max_steps": 1})
    assert main(["train", str(config)]) == 0
    before = files_of(tmp_path / "runs")
    with monkeypatch.context() as patched:  # a taken name is refused before minutes of loading
        patched.setattr(training_run, "load_parts", lambda inputs: pytest.fail("loaded"))
        refused(["train", str(config)], "run.name_taken", capsys, "runs/mine")
    assert files_of(tmp_path / "runs") == before
    for expected in ("tiny-001", "tiny-002"):
        assert main(["train", str(config), "training.run_name=null"]) == 0
        assert (tmp_path / "runs" / expected / "adapter").is_dir()
    assert {name: content for name, content in files_of(tmp_path / "runs").items() if name.startswith("mine")} == before


def test_dollars_without_a_price_are_refused_before_anything_is_loaded(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # it has no price table
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    monkeypatch.setattr(training_run, "load_parts", lambda inputs: pytest.fail("loaded"))
    message = r"^finetune: budget\.max_run_usd: the price of this machine is unknown .*; set budget\.usd_per_hour$"
    refused(["train", str(tiny_config(budget={"max_run_usd": 5.0}))], "price.unknown", capsys, message)
    monkeypatch.setenv("FINETUNE_PRICES", "{")
    config = tiny_config(budget={"max_run_usd": 5.0, "usd_per_hour": 1.0})
    refused(["train", str(config)], "price.bad_table", capsys, r"^finetune: FINETUNE_PRICES: ")
    assert not (tmp_path / "runs").exists()


def test_a_run_with_a_ceiling_in_dollars_is_not_resumed_without_a_price(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    change(run / "config.yaml", "budget", max_run_usd=5.0, usd_per_hour=None)
    for status in ("interrupted", "budget_stop"):
        (run / "run.json").write_text(json.dumps(record_of(run) | {"status": status}))
        before = files_of(run)
        refused(["train", "--resume", str(run)], "price.unknown", capsys)
        assert files_of(run) == before


def test_a_run_that_cannot_be_resumed_is_refused(tiny_run: Path, tmp_path: Path, capsys: Shown) -> None:
    before = files_of(tiny_run)
    refused(["train", "--resume", str(tiny_run)], "run.done", capsys, "this run is done; start a new one, or score it")
    refused(["train", "--resume", str(tiny_run.parent)], "run.not_found", capsys, "runs: ")
    refused(["train", "--resume", str(tiny_run / "x")], "run.not_found", capsys, "x: ")
    refused(["train", "--resume", str(tiny_run), "lora.r=8"], "cli.conflicting_options", capsys, "--resume")
    assert files_of(tiny_run) == before


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"run_id": text} for text in ("x/../some/folder", "../some/folder", "{outside}", "", "x/../../some/folder")],
        *[{"attempts": -1}, {"attempts": 10**400}, {"threads": 0}, {"wall_seconds": 1e308}],
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_a_record_whose_values_would_become_paths_or_bounds_is_refused_and_nothing_is_deleted(
    wrong: dict[str, Any], tiny_run: Path, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for folder in (temporary / "some" / "folder", tmp_path / "some" / "folder", temporary / "finetune-x"):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("years of work")
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    wrong = {
        name: str(temporary / "some" / "folder") if value == "{outside}" else value for name, value in wrong.items()
    }
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"} | wrong))
    for _ in range(2):
        key, value = next(iter(wrong.items()))
        code, said = ("file.bad_json", "401 digits") if value == 10**400 else ("run.bad_record", f"{key}: expected")
        refused(["train", "--resume", str(run)], code, capsys, rf"run\.json: .*{said}|run\.json: {said}")
    assert len(list(tmp_path.rglob("thesis.txt"))) == 3


def test_a_run_whose_config_or_data_changed_is_not_resumed(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: Shown
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    config = (run / "config.yaml").read_text()
    before = {name: text for name, text in files_of(run).items() if not name.startswith("lease/")}
    changed = r"training\.learning_rate: 0\.01 -> 0\.02: refused, .*; restore the earlier values, or start a new run"
    change(run / "config.yaml", "training", learning_rate=2e-2)
    refused(["train", "--resume", str(run)], "resume.config_changed", capsys, rf"config\.yaml: {changed}")
    (run / "config.yaml").write_text(config)
    shutil.copytree(tiny_data, tmp_path / "prepared")
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest, indent=3))
    change(run / "config.yaml", "data", output_dir=str(tmp_path / "prepared"))
    message = r"step-6: was trained on different data; prepare the same data again"
    refused(["train", "--resume", str(run)], "resume.data_changed", capsys, message)
    (run / "config.yaml").write_text(config)
    assert {name: text for name, text in files_of(run).items() if not name.startswith("lease/")} == before


# --- a disk or a GPU that is full, a disk that cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """small_disk("size=300k") is a folder on a separate small file system; skipped unless the tests run as root."""
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
def test_a_full_disk_is_reported_in_one_line(
    kilobytes: int, small_disk: Callable[..., Path], tiny_config: ConfigWriter, capsys: Shown
) -> None:
    disk = small_disk(f"size={kilobytes}k")
    config = tiny_config(training={"output_dir": str(disk / "runs")})
    said = refused(["train", str(config)], "disk.full", capsys, f"{disk}/")
    for run in (disk / "runs").glob("*"):
        assert record_of(run)["status"] == "failed" or f"{run / 'run.json'}: no space left" in said
        assert not (run / "adapter").exists()
        assert list(run.rglob("checkpoint-*")) == []
        assert all(
            checkpoint_folders.fault(folder) is None for folder in checkpoint_folders.newest_first(run / "checkpoints")
        )


@pytest.mark.parametrize("kilobytes", [40, 160])
def test_a_full_scratch_disk_keeps_no_half_save(
    kilobytes: int,
    small_disk: Callable[..., Path],
    tiny_config: ConfigWriter,
    capsys: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = small_disk(f"size={kilobytes}k")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    refused(["train", str(tiny_config())], "disk.full", capsys, f"{disk}: no space left")
    assert [path for path in disk.rglob("checkpoint-*") if not (path / LABELS).exists()] == []


FAULTS = [
    (
        OSError(errno.ENOSPC, "No space left on device"),
        "disk.full",
        "runs/tiny-001: ",
    ),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "disk.full", "runs/tiny-001: "),
    (OSError(errno.EIO, "Input/output error"), "disk.error", "runs/tiny-001: Input/output error"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "gpu.out_of_memory",
        r"out of GPU memory outside a step's .* passes, .*: lower training\.per_device_eval_batch_size, set training\.max_memory",
    ),
]


@pytest.mark.parametrize(("fault", "code", "message"), FAULTS)
def test_a_fault_of_the_machine_is_reported_in_one_line(
    fault: Exception, code: str, message: str, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Shown,
) -> None:  # fmt: skip
    def happens() -> None:
        raise fault

    at_step(2, happens, monkeypatch)
    refused(["train", str(tiny_config())], code, capsys, message)
    assert record_of(tmp_path / "runs" / "tiny-001")["status"] == "failed"


def test_an_adapter_that_cannot_be_saved_leaves_no_partial_folder_and_is_saved_by_resume(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def full(place: str) -> None:
        if place == "adapter":
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fault_injection, "place", full)
        refused(["train", str(tiny_config())], "disk.full", capsys, "runs/tiny-001: ")
    run = tmp_path / "runs" / "tiny-001"
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "run.json", "checkpoints", "ledger", "lease", "tensorboard"}
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "adapter" / "prompt.json").is_file()


def test_an_output_folder_that_is_not_writable_is_refused(
    small_disk: Callable[..., Path], tiny_config: ConfigWriter, capsys: Shown
) -> None:
    disk = small_disk("ro")
    config = tiny_config(training={"output_dir": str(disk / "runs")})
    refused(["train", str(config)], "disk.not_writable", capsys, "disk0/runs: ")
    assert list(disk.iterdir()) == []
