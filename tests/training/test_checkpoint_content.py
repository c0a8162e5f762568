"""A folder whose manifest is right is still no checkpoint without the whole state of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402
from safetensors.torch import load_file, save_file

from finetune.checkpoint.folders import newest_first, read_manifest
from finetune.checkpoint.manifest import manifest_text
from finetune.checkpoint.store import CheckpointStore
from finetune.cli.main import main
from finetune.runtime.files import sha256_file
from finetune.training.checkpoint_content import REQUIRED, content_fault
from tests.helpers.train_helpers import adapter_of, record_of

pytestmark = pytest.mark.usefixtures("no_keys")
Damage = Callable[[Path], object]


def reseal(folder: Path) -> None:
    """Write a manifest that is right about the files as they are now."""
    manifest = read_manifest(folder)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(manifest_text({**manifest, "files": files}))


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def pickled(name: str, value: Any) -> Damage:
    return lambda folder: torch.save(value, folder / name)


def weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return write


def of_state(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def write(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=True)
        change(state)
        torch.save(state, folder / name)

    return write


def of_json(name: str, **values: Any) -> Damage:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def of_group(**values: Any) -> Damage:
    return of_state("optimizer.pt", lambda state: state["param_groups"][0].update(values))


def of_moments(**values: Any) -> Damage:
    return of_state("optimizer.pt", lambda state: [moment.update(values) for moment in state["state"].values()])


def drop_half(tensors: dict[str, Any]) -> None:
    for name in sorted(tensors)[::2]:
        del tensors[name]


def make_nan(tensors: dict[str, Any]) -> None:
    tensors[sorted(tensors)[-1]].view(-1)[0] = torch.nan


DAMAGE: dict[str, tuple[Damage, str]] = {
    **{f"no {name}": (removed(name), f"the manifest lists no {name}") for name in REQUIRED},
    "an empty optimizer": (pickled("optimizer.pt", {}), "optimizer.pt is empty"),
    "an optimizer without moments": (
        of_state("optimizer.pt", lambda state: state["state"].clear()), "optimizer.pt holds no moments"
    ),
    "an optimizer without groups": (
        of_state("optimizer.pt", lambda state: state["param_groups"].clear()), "optimizer.pt is not the state of an optimizer"
    ),
    "an optimizer that is a list": (pickled("optimizer.pt", [1]), "optimizer.pt is empty"),
    "an optimizer that is text": (text("optimizer.pt", "hello"), "optimizer.pt is not readable"),
    "an optimizer of no bytes": (text("optimizer.pt", ""), "optimizer.pt is not readable"),
    "an empty schedule": (pickled("scheduler.pt", {}), "scheduler.pt is empty"),
    "a schedule without a place": (of_state("scheduler.pt", lambda state: state.pop("last_epoch")), "scheduler.pt has no place"),
    "a schedule of a later step": (of_state("scheduler.pt", lambda s: s.update(last_epoch=99)), "scheduler.pt has no place"),
    "a learning rate that is text": (of_group(lr="x"), "optimizer.pt has no lr"),
    "a learning rate that is not finite": (of_group(lr=float("nan")), "optimizer.pt has no lr"),
    "no betas": (of_group(betas=None), "optimizer.pt has no betas"),
    "a group without parameters": (of_group(params=None), "optimizer.pt is not the state"),
    "moments that are text": (of_state("optimizer.pt", lambda state: state["state"].update({0: "x"})), "optimizer.pt is not the"),
    "steps that are text": (of_moments(step="x"), "optimizer.pt has no number of steps"),
    "no second moments": (of_moments(exp_avg_sq=None), "optimizer.pt lacks the second moments"),
    "moments that are not finite": (of_moments(step=torch.tensor(2.0), extra=torch.tensor(torch.nan)), "not finite"),
    "a schedule without rates": (of_state("scheduler.pt", lambda s: s.update(base_lrs=[])), "scheduler.pt has no base_lrs"),
    "rates that are text": (of_state("scheduler.pt", lambda s: s.update(_last_lr=["x"])), "scheduler.pt has no _last_lr"),
    "lambdas that are text": (of_state("scheduler.pt", lambda s: s.update(lr_lambdas="x")), "scheduler.pt has no lr_lambdas"),
    "no steps between logs": (of_json("trainer_state.json", logging_steps=0), "trainer_state.json has no logging_steps"),
    "no batch size": (of_json("trainer_state.json", train_batch_size=None), "trainer_state.json has no train_batch_size"),
    "no trainer": (of_json("trainer_state.json", stateful_callbacks={"x": 1}), "trainer_state.json lacks the state of the"),
    "a loss beyond float32": (of_json("window.json", loss=1e308), "window.json holds a loss"),
    "a number of 500 digits": (text("window.json", '{"a": ' + "1" * 500 + "}"), "window.json is not readable"),
    "no random states": (pickled("rng-0.pt", {}), "rng-0.pt is empty"),
    "a missing random state": (of_state("rng-0.pt", lambda state: state.pop("cpu")), "rng-0.pt lacks"),
    "an empty trainer state": (text("trainer_state.json", "{}"), "trainer_state.json is empty"),
    "a trainer state of another step": (text("trainer_state.json", '{"global_step": 5}'), "trainer_state.json is of step 5"),
    "nested brackets": (text("window.json", "[" * 100_000), "window.json is not readable"),
    "half an adapter": (weights(drop_half), "optimizer.pt is of"),
    "an adapter without tensors": (weights(dict.clear), "adapter_model.safetensors holds no tensor"),
    "an adapter that is not finite": (weights(make_nan), "values that are not finite"),
    "an adapter of no bytes": (text("adapter_model.safetensors", ""), "adapter_model.safetensors is not readable"),
}  # fmt: skip


@pytest.fixture
def checkpoint(tiny_run: Path, tmp_path: Path) -> Path:
    newest = next(newest_first(tiny_run / "checkpoints"))
    return Path(shutil.copytree(newest, tmp_path / "checkpoints" / newest.name))


def store_over(checkpoint: Path) -> CheckpointStore:
    run_id = read_manifest(checkpoint)["run_id"]
    return CheckpointStore(checkpoint.parent, run_id=run_id, required=REQUIRED, content=content_fault)


def test_a_checkpoint_that_a_run_has_saved_is_one(checkpoint: Path) -> None:
    assert store_over(checkpoint).latest_valid() == (checkpoint, [])
    assert set(REQUIRED) <= read_manifest(checkpoint)["files"].keys()
    reseal(checkpoint)
    assert store_over(checkpoint).latest_valid() == (checkpoint, [])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_is_not_whole_is_refused_whatever_its_manifest_says(checkpoint: Path, name: str) -> None:
    damage, why = DAMAGE[name]
    damage(checkpoint)
    reseal(checkpoint)
    store = store_over(checkpoint)
    found, [skipped] = store.latest_valid()
    assert found is None and skipped.corrupt
    assert skipped.reason.startswith(why) or why in skipped.reason, skipped.reason
    assert "\n" not in skipped.reason
    assert store.prune() == []


def test_float16_may_have_skipped_every_step_so_far(checkpoint: Path) -> None:
    of_state("optimizer.pt", lambda state: state["state"].clear())(checkpoint)
    torch.save({"scale": 65536.0}, checkpoint / "scaler.pt")
    reseal(checkpoint)
    assert store_over(checkpoint).latest_valid() == (checkpoint, [])


def test_a_resume_passes_over_an_empty_state_and_ends_as_it_would_have(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text(json.dumps(record_of(tiny_run) | {"status": "running"}))
    newest, older = list(newest_first(run / "checkpoints"))
    pickled("optimizer.pt", {"state": {}, "param_groups": []})(newest)
    reseal(newest)
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"passed over {newest}: optimizer.pt is not the state of an optimizer" in said
    assert f"resuming from {older}" in said
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert adapter_of(run) == adapter_of(tiny_run)
