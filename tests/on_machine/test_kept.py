"""What launches keep in the bucket for the next ones: whole or not used, and the same bytes on the next machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from on_machine.kept.hub import model_named
from on_machine.kept.manifests import MANIFEST, new_folder, read_manifest, write_manifest
from tests.helpers.kept_machine import DAMAGED, KEY, NOT_THERE, TREE, Machine, flip, loads, start_of_keep
from tests.helpers.machine_fixture import ROOT
from tests.helpers.model_hub import COMMIT, NAME, model_hub


@pytest.fixture
def first(tmp_path: Path) -> Machine:
    """With an environment that was installed from the index, whose interpreter is in the home folder, too."""
    machine = Machine(tmp_path / "first", tmp_path / "bucket")
    interpreter = machine.home / ".local/share/uv/python/cpython-3.11/bin"
    interpreter.mkdir(parents=True)
    (interpreter / "python3.11").write_text("#!/bin/sh\necho python\n")
    (interpreter / "python3.11").chmod(0o755)
    environment = machine.home / TREE
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(interpreter / "python3.11")
    (environment / "lib" / "empty").mkdir(parents=True)
    (environment / "lib64").symlink_to("lib")
    (environment / "lib" / "a name with\nspaces").write_bytes(os.urandom(70_000))
    return machine


@pytest.fixture
def second(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "second", tmp_path / "bucket")


def contents(folder: Path) -> dict[str, Any]:
    """Every file, link and empty folder with what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path).replace("/first/", "/HOME/").replace("/second/", "/HOME/"))
        elif path.is_file():
            found[name] = (path.stat().st_mode, int(path.stat().st_mtime), path.read_bytes())
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def test_an_environment_is_the_same_on_the_next_machine(first: Machine, second: Machine) -> None:
    assert first.kept("keep-packages", first.packages, TREE)[0] == 0
    second.state("set-up.log").touch()
    code, said = second.kept("fetch-packages", second.packages, TREE)
    assert code == 0 and "GB in" in said
    for tree in (TREE, ".local/share/uv"):
        assert contents(second.home / tree) == contents(first.home / tree)
    assert second.state("set-up.log").read_text().startswith("= packages_bytes ")
    assert [path.name for path in second.state("").iterdir()] == ["set-up.log"], "nothing else is left"


def test_a_machine_without_zstd_packs_with_gzip(first: Machine, second: Machine, tmp_path: Path) -> None:
    for name in ("tar", "gzip"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    first.env["PATH"] = str(tmp_path / "bin")
    assert first.kept("keep-packages", first.packages, TREE)[0] == 0
    assert [path.name for path in first.packages.glob("*/*")] == ["000.tar.gzip"]
    assert second.kept("fetch-packages", second.packages, TREE)[0] == 0
    assert contents(second.home / TREE) == contents(first.home / TREE)


def test_a_part_that_was_packed_with_what_is_not_here_is_not_used(
    first: Machine, second: Machine, tmp_path: Path
) -> None:
    if not shutil.which("zstd"):
        pytest.skip("no zstd")
    first.kept("keep-packages", first.packages, TREE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tar").symlink_to(str(shutil.which("tar")))
    second.env["PATH"] = str(tmp_path / "bin")
    code, said = second.kept("fetch-packages", second.packages, TREE)
    assert (code, len(said.splitlines())) == (DAMAGED, 1) and "was packed with zstd" in said


def test_where_nothing_is_kept_nothing_is_said(second: Machine) -> None:
    assert second.kept("fetch-packages", second.packages, TREE) == (NOT_THERE, "")
    assert second.kept("fetch-model", second.bucket, "no-uv", "", "a config") == (NOT_THERE, "")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_part_is_not_used(damage: Any, first: Machine, second: Machine) -> None:
    first.kept("keep-packages", first.packages, TREE)
    (part,) = first.packages.glob("*/*.tar.*")
    damage(part)
    code, said = second.kept("fetch-packages", second.packages, TREE)
    assert (code, len(said.splitlines())) == (DAMAGED, 1) and "the bucket's copy is not used" in said
    assert contents(second.home) == {".finetune": "empty"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"folder": "../x", "files": []}',
        '{"folder": "x", "files": [{"name": "/etc/passwd"}], "trees": ["finetune-env"], "python": "/"}',
        '{"folder": "x", "files": [], "trees": ["finetune-env", "../.ssh"], "python": "/"}',
        '{"folder": "x", "files": [], "trees": ["finetune-vllm"], "python": "/"}',
        '{"folder": "x", "files": [], "trees": ["finetune-env"], "python": "/no/such/python"}',
        '{"folder": "x", "files": [], "trees": ["finetune-env"], "python": "/", "packer": "sh"}',
    ],
)
def test_a_manifest_that_cannot_be_used_is_not(text: str, second: Machine) -> None:
    second.packages.mkdir(parents=True)
    (second.packages / "manifest.json").write_text(text)
    code, said = second.kept("fetch-packages", second.packages, TREE)
    assert (code, len(said.splitlines())) == (DAMAGED, 1), said
    assert contents(second.home) == {".finetune": "empty"}


def test_a_writer_that_is_killed_leaves_nothing_that_looks_whole(first: Machine, second: Machine) -> None:
    with (first.home / TREE / "large").open("wb") as file:
        file.truncate(3 << 30)
    command = [sys.executable, "-m", "on_machine.kept", "keep-packages", str(first.packages), TREE]
    writer = subprocess.Popen(command, cwd=ROOT, env=first.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(first.packages.glob("*/*.tar.*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    assert second.kept("fetch-packages", second.packages, TREE) == (NOT_THERE, "")
    (first.home / TREE / "large").unlink()
    assert first.kept("keep-packages", first.packages, TREE)[0] == 0
    assert second.kept("fetch-packages", second.packages, TREE)[0] == 0, "the next one is not disturbed by it"


def test_two_machines_keep_the_same_thing_at_once(first: Machine, second: Machine, tmp_path: Path) -> None:
    other = Machine(tmp_path / "other", tmp_path / "bucket")
    shutil.copytree(first.home / TREE, other.home / TREE, symlinks=True)
    command = [sys.executable, "-m", "on_machine.kept", "keep-packages", str(first.packages), TREE]
    writers = [subprocess.Popen(command, cwd=ROOT, env=one.env) for one in (first, other)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert second.kept("fetch-packages", second.packages, TREE)[0] == 0
    assert contents(second.home / TREE / "lib") == contents(first.home / TREE / "lib")


def test_a_second_manifest_takes_the_place_of_the_first_as_a_whole(tmp_path: Path) -> None:
    made = [new_folder(tmp_path), new_folder(tmp_path)]
    write_manifest(tmp_path, {"folder": made[0].name, "files": [], "trees": ["a longer text than the second one's"]})
    before = (tmp_path / MANIFEST).read_text()
    with (tmp_path / MANIFEST).open() as reader:
        write_manifest(tmp_path, {"folder": made[1].name, "files": []})
        assert reader.read() == before, "somebody who reads meanwhile has one or the other"
    assert (read_manifest(tmp_path) or {})["folder"] == made[1].name
    assert not list(tmp_path.glob("*/*")), "nothing is left in the writers' folders"


def test_what_is_kept_already_is_left_alone_and_old_environments_go(first: Machine) -> None:
    for number in range(6):
        folder = first.bucket / "packages" / f"{number:032x}"
        assert first.kept("keep-packages", folder, TREE)[0] == 0
    assert sorted(path.name[-1] for path in (first.bucket / "packages").iterdir()) == ["2", "3", "4", "5"]
    before = contents(first.bucket)
    assert first.kept("keep-packages", folder, TREE)[0] == 0
    assert contents(first.bucket) == before


def test_what_a_killed_writer_left_a_day_ago_goes(first: Machine) -> None:
    first.kept("keep-packages", first.packages, TREE)
    unfinished = first.packages.with_name("2" * 32)
    gone = [first.packages / "abandoned", unfinished / "abandoned"]
    left = [
        first.packages / "being-written",
        first.packages / "begun",
        unfinished.with_name("3" * 32) / "being-written",
    ]
    for folder in (*gone, *left):
        folder.mkdir(parents=True)
        if folder.name != "begun":
            (folder / "000.tar.gz").touch()
    for folder in gone:
        os.utime(folder / "000.tar.gz", (time.time() - 90_000, time.time() - 90_000))
    first.kept("keep-packages", first.packages.with_name("1" * 32), TREE)
    assert [folder.exists() for folder in (*gone, *left)] == [False, False, True, True, True]


# model files


def test_a_model_of_the_hub_is_fetched_once(first: Machine, second: Machine, tiny_model: Path) -> None:
    first.bucket.mkdir()
    with model_hub(tiny_model) as hub:
        keeper = start_of_keep(first)
        expected = loads(first, hub.url)
        assert any("model.safetensors" in one for one in hub.asked)
        assert not list(first.bucket.iterdir()), "it waits for the first step"
        first.state("packages.keys").write_text(f"{TREE} {KEY}\n")
        first.state("set-up.json").write_text('{"parts": {"boot": 1.0}, "facts": {}}\n')
        assert keeper.wait(60) == 0
        assert {path.name for path in first.bucket.iterdir()} == {"packages", "models", "set-up"}
        assert json.loads((first.bucket / "set-up" / "tiny.jsonl").read_text())["parts"] == {"boot": 1.0}
        second.state("set-up.log").touch()
        other = f"model: {{name: other, revision: {COMMIT}}}"
        assert second.kept("fetch-model", second.bucket, "no-uv", "", other)[0] == NOT_THERE
        config = f"model:\n  name: {NAME}\n"
        assert second.kept("fetch-model", second.bucket, "no-uv", "lora.r=8", config)[0] == NOT_THERE, "no commit"
        assert second.kept("fetch-model", second.bucket, "no-uv", f"model.revision={COMMIT}", config)[0] == 0
        hub.asked.clear()
        assert loads(second, hub.url) == expected
        assert all("/tree/" in one for one in hub.asked), f"only whether there are further templates: {hub.asked}"
    assert loads(second, "http://127.0.0.1:9") == expected, "nor is the hub needed at all"
    facts = dict(line.split()[1:] for line in second.state("set-up.log").read_text().splitlines())
    assert (
        facts["model_from"] == "bucket"
        and int(facts["model_bytes"]) > (tiny_model / "model.safetensors").stat().st_size
    )
    (weights,) = first.bucket.glob("models/*/*/model.safetensors")
    flip(weights)
    shutil.rmtree(second.home / ".cache")
    code, said = second.kept("fetch-model", second.bucket, "no-uv", f"name={COMMIT}", config)
    assert (code, len(said.splitlines())) == (NOT_THERE, 1) and "the bucket's copy is not used" in said
    assert not list(second.home.glob(".cache/huggingface/hub/*/snapshots/*")), "never half a model"


YAML = f"""\
# a comment
data: {{name: other/data}}
model:            # the base
  name: "{NAME}"  # of the hub
  revision: {COMMIT}
lora:
  name: some/lora
"""


@pytest.mark.parametrize("installed", [True, False], ids=["by the environment", "by uv"])
def test_a_model_that_is_not_kept_is_downloaded_beside_the_packages(
    installed: bool, first: Machine, tiny_model: Path
) -> None:
    """uv is a stand-in that runs this Python."""
    program = first.home / (f"{TREE}/bin/python" if installed else "uv")
    program.unlink(missing_ok=True)
    if not installed:
        (first.home / TREE / "bin" / "python").unlink()
    words = f'echo "$1 $2 $7" >>{first.home}/asked\n[ "$1" != run ] || shift 8'
    program.write_text(f'#!/bin/sh\n{words}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    with model_hub(tiny_model) as hub:
        first.env["HF_ENDPOINT"] = hub.url
        code, said = first.kept("fetch-model", first.bucket, first.home / "uv", "lora.r=8", YAML)
        assert code == 0 and f"{NAME} is downloaded from the hub" in said, said
        asked = (first.home / "asked").read_text()
        assert asked.startswith("-c" if installed else "run --quiet huggingface_hub==")
        hub.asked.clear()
        loads(first, hub.url)
        assert not [one for one in hub.asked if "GET" in one and "resolve" in one], "nothing is left to download"


def test_a_download_that_fails_is_left_to_the_loader(first: Machine) -> None:
    shutil.rmtree(first.home / TREE)
    code, said = first.kept("fetch-model", first.bucket, "/bin/false", "", YAML)
    assert (code, len(said.splitlines())) == (DAMAGED, 1) and "is downloaded when it is loaded" in said


@pytest.mark.parametrize(
    ("overrides", "config", "named"),
    [
        ("", YAML, (NAME, COMMIT)),
        ("lora.r=8 model.name=a/b", YAML, ("a/b", COMMIT)),
        (f"model.name=a/b model.revision={COMMIT}", "", ("a/b", COMMIT)),
        ("model.revision=main", YAML, None),
        ("model.name=configs/mistral_7b_qlora.yaml", YAML, None),
        ("model.name=--force/x", YAML, None),
        ("model.name=package://a/b.gguf", YAML, None),
        ("", f"other:\n  name: {NAME}\n  revision: {COMMIT}\n", None),
        ("", "", None),
    ],
)
def test_the_model_that_a_task_names(
    overrides: str, config: str, named: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert model_named(overrides, config) == named


def test_blocks_are_put_together_in_their_order(first: Machine, second: Machine) -> None:
    """With files of several blocks, of exactly one, and of none."""
    snapshot = first.home / f".cache/huggingface/hub/models--{NAME.replace('/', '--')}/snapshots/{COMMIT}"
    (snapshot / "below").mkdir(parents=True)
    sizes = {"a.safetensors": (1 << 27) * 2 + 5, "b": 1 << 27, "c": 0, "below/d": 7}
    for name, size in sizes.items():
        with (snapshot / name).open("wb") as file:
            file.truncate(size)
            file.seek(max(0, size - 5))
            file.write(name[-1:].encode() * min(5, size))
    keeper = start_of_keep(first)
    first.state("set-up.json").write_text('{"parts": {}, "facts": {}}\n')
    assert keeper.wait(60) == 0
    assert not (first.bucket / "set-up").exists(), "a launch whose parts are unknown is not recorded"
    assert second.kept("fetch-model", second.bucket, "no-uv", NAME, COMMIT)[0] == 0
    for name in sizes:
        there = second.home / snapshot.relative_to(first.home) / name
        assert subprocess.run(["cmp", snapshot / name, there], check=False).returncode == 0, name


def test_the_process_that_keeps_ends_with_a_job_that_came_to_no_step(first: Machine) -> None:
    job = subprocess.Popen(["sleep", "60"])
    about = {"pid": job.pid, "model": NAME, "revision": COMMIT, "record": "tiny.jsonl"}
    command = [sys.executable, "-m", "on_machine.kept", "keep", str(first.bucket), json.dumps(about)]
    keeper = subprocess.Popen(command, cwd=ROOT, env=first.env)
    job.kill()
    job.wait()
    assert keeper.wait(30) == 0
    assert not first.bucket.exists()
