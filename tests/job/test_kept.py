"""A job waits for the model files that set-up fetches, says where the model comes from, and starts what fills the bucket."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from finetune.config.schema import ModelSection
from finetune.job import kept
from finetune.job.settings import JobSettings, read_settings
from finetune.machine import set_up

HUB = ModelSection(name="some/model", revision="0123456789abcdef0123456789abcdef01234567")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSettings:
    """Of a machine that has just been set up; its checkout has the folder of a model."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    (checkout / "tiny").mkdir(parents=True)
    (home / ".finetune").mkdir(parents=True)
    (home / set_up.LOG).write_text("60.0 boot\n")
    monkeypatch.chdir(checkout)
    values = {"HOME": str(home), "PATH": os.environ["PATH"], "FINETUNE_MOUNT": str(tmp_path / "bucket")}
    return read_settings(values)


def facts(settings: JobSettings) -> dict[str, str]:
    known = set_up.read(settings.state.parent)
    assert known is not None
    return known.facts


def test_it_waits_while_model_files_are_fetched(settings: JobSettings, capsys: pytest.CaptureFixture[str]) -> None:
    with (settings.state / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (settings.state / "model.log").write_text("set-up: some/model from the bucket: 14.49 GB in 41.0 s\n")
        with (settings.state.parent / set_up.LOG).open("a") as log:
            log.write("= model_from bucket\n")
        releasing = threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        releasing.start()
        began = time.monotonic()
        kept.wait_for_model(HUB, settings)
        assert 0.4 < time.monotonic() - began < 5
    said = capsys.readouterr().err
    assert "waiting for the model files from the bucket" in said and "14.49 GB in 41.0 s" in said
    assert facts(settings) == {"model_from": "bucket"}


def test_files_that_do_not_come_are_not_waited_for_without_end(
    settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WAIT_SECONDS", 0.3)
    with (settings.state / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept.wait_for_model(HUB, settings)
    assert facts(settings) == {"model_from": "hub"}


@pytest.mark.parametrize(("name", "source"), [("some/model", "hub"), ("tiny", "here"), ("package://a/b.gguf", "here")])
def test_where_the_model_comes_from(name: str, source: str, settings: JobSettings) -> None:
    kept.wait_for_model(ModelSection(name=name), settings)
    assert facts(settings) == {"model_from": source}


def test_what_keeps_is_detached_and_at_the_lowest_priority(
    settings: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nps -o pid=,sid=,nice= $$ >{tmp_path}/ps\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    program.chmod(0o755)
    settings.environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", settings.environment["PATH"])
    kept.keep_after_first_step(HUB, settings)
    deadline = time.monotonic() + 10
    while not (tmp_path / "words").exists() or len((tmp_path / "words").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid, session, nice = (tmp_path / "ps").read_text().split()
    assert pid == session != str(os.getsid(0)) and nice == "19"
    *words, about = (tmp_path / "words").read_text().splitlines()
    assert words == ["-m", "on_machine.kept", "keep", str(settings.mount)]
    assert json.loads(about) == {
        "pid": os.getpid(), "model": HUB.name, "revision": HUB.revision, "record": set_up.record_name(HUB.name)
    }  # fmt: skip


def test_a_run_goes_on_without_it(settings: JobSettings, capsys: pytest.CaptureFixture[str]) -> None:
    settings.environment["PATH"] = "/nowhere"
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        kept.keep_after_first_step(HUB, settings)
    assert "nothing is kept in the bucket for later launches" in capsys.readouterr().err
