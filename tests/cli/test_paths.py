"""Paths on the command line: `~` and variables are expanded where the shell did not, and what no path can be is one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config import load
from finetune.job.settings import read_settings
from tests.helpers.errors import reported

HEAD = "model: {name: some/model}\ndata: {output_dir: out, sources: [{kind: jsonl, path: data.jsonl}]}\n"
Shown = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(HEAD)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("path", ["~/run.yaml", "$HOME/run.yaml", "${HOME}/run.yaml"])
def test_a_path_in_quotes_is_expanded(path: str, home: Path, capsys: Shown) -> None:
    assert main(["config", path, "training.output_dir=~/runs"]) == 0
    assert f"output_dir: {home}/runs\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["report"],
        ["evaluate"],
        ["train"],
        ["train", "--resume"],
        ["generate", "--db=x", "q"],
        ["data", "check"],
        ["plan"],
    ],
)
def test_a_path_that_cannot_be_is_one_line_for_every_command(words: list[str], home: Path, capsys: Shown) -> None:
    for path, code in (
        ("x" * 300, "path.impossible"),
        ("$HF_TOKEN/x", "path.variable_refused"),
        ("~no-such-user/x", "path.no_home"),
    ):
        position = words.index("q") if "q" in words else len(words)
        with reported(code):
            assert main([*words[:position], path, *words[position:]]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1 and len(shown.err) < 400


def test_a_run_below_the_home_folder_is_found(home: Path, capsys: Shown) -> None:
    (home / "runs" / "r").mkdir(parents=True)
    (home / "runs" / "r" / "config.yaml").write_text(HEAD)
    with reported("file.missing"):
        assert main(["report", "~/runs/r"]) == 2
    assert f"{home}/runs/r/run.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EACCES, errno.ENOTDIR, errno.ELOOP, errno.ENOSPC])
def test_what_the_system_says_of_a_path_is_one_line(
    number: int, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some/\x1bpath")

    monkeypatch.setattr(load, "load_config", fails)
    assert main(["config", "~/run.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(r"finetune: some/\x1bpath: ") and len(said.splitlines()) == 1
    monkeypatch.setattr(load, "load_config", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError):  # a fault of the machine keeps its traceback
        main(["config", "~/run.yaml"])


def test_a_pipe_and_a_device_are_named_and_not_waited_for(home: Path, capsys: Shown) -> None:
    os.mkfifo("pipe.yaml")
    for path, kind in (("pipe.yaml", "a pipe"), ("/dev/zero", "a device"), (".", "a folder")):
        with reported("config.not_found"):
            assert main(["config", path]) == 2
        assert f"{path}: cannot be read as a config file: is {kind}, not a file" in capsys.readouterr().err


def test_a_job_expands_its_paths_on_the_machine(home: Path) -> None:
    settings = read_settings({"CONFIG": "~/run.yaml", "FINETUNE_MOUNT": "$HOME/bucket", "RUN_NAME": "1.10"})
    assert (settings.config, settings.mount) == (f"{home}/run.yaml", home / "bucket")
    assert settings.run_name == "1.10"
