"""Commands inside messages can be pasted, also where the name of a run has a space."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.main import main
from finetune.doctor.cloud import sky_program_check
from finetune.run_folder import RunFolder
from finetune.runtime.commands import as_command, env_option
from tests.conftest import ConfigWriter
from tests.helpers.run_examples import copy_run

ROOT = Path(__file__).resolve().parents[1]
NAME = "second try"
PUT_TOGETHER = re.compile(
    r"finetune (?:train|evaluate|report|export|compare|serve|plan|launch|sweep|data \w+) [^`;()]*?\{(?![A-Z_]+[}\[])"
)
"""A command of ours in an f-string with anything but a constant in it."""


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    """A finished run with a space in its name."""
    copy = copy_run(tiny_run, tmp_path, training={"output_dir": str(tmp_path), "run_name": NAME})
    return RunFolder(copy.path.rename(tmp_path / NAME))


def commands(text: str) -> list[list[str]]:
    """The words of the commands between backticks, as the shell sees them."""
    return [shlex.split(command) for command in re.findall(r"`([^`]*)`", text)]


@given(st.lists(st.text("ab '\"$`\\!=[]{}\n~*#", min_size=0, max_size=8), min_size=1, max_size=4))
def test_a_command_is_what_bash_reads(words: list[str]) -> None:
    read = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {as_command(*words)}"], capture_output=True, text=True, check=True
    )
    assert read.stdout.split("\0")[:-1] == words


def test_a_command_is_easy_to_read() -> None:
    assert as_command("--env", "X='a b' c") == "--env \"X='a b' c\""
    assert as_command("finetune", "evaluate", Path("runs/demo")) == "finetune evaluate runs/demo"
    assert env_option("RUN_NAME", NAME) == "--env 'RUN_NAME=second try'"


def test_a_run_whose_name_has_a_space_can_be_named_in_every_command(
    run: RunFolder, tiny_config: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(run.path)
    evaluate, resume = ["finetune", "evaluate", name], ["finetune", "train", "--resume", name]
    config = str(tiny_config(training={"output_dir": str(run.path.parent), "run_name": NAME}))
    refused = [
        (["train", "--resume", name], evaluate),
        (["train", config], resume),
        (["export", name, "--to", "merged"], evaluate),
        (["compare", name, name], evaluate),
    ]
    damaged = [(["report", name], evaluate), (["export", name, "--to", "merged"], evaluate)]
    for number, (words, expected) in enumerate([*refused, *damaged]):
        if number == len(refused):
            run.eval_json.write_text("no json")
            run.eval_rows("tuned").parent.mkdir()
            run.eval_rows("tuned").write_text("no json")
        capsys.readouterr()
        assert main(words) == 2, words
        assert expected in commands(capsys.readouterr().err), words


def test_a_report_of_a_run_without_a_score_too(run: RunFolder) -> None:
    assert main(["report", str(run.path)]) == 0
    assert f"To measure it: finetune evaluate '{run.path}'" in (run.path / "report.md").read_text().replace("\\", "")


def test_no_message_puts_a_command_together_without_quotes() -> None:
    texts = [
        (path, node.lineno, "".join(_text(part) for part in node.values))
        for path in sorted((ROOT / "finetune").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
    ]
    assert len(texts) > 500
    found = [f"{path}:{line}: {text}" for path, line, text in texts if PUT_TOGETHER.search(text)]
    assert not found, "use finetune/runtime/commands.py"


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]


def test_the_folder_of_an_environment_may_have_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "my env" / "bin"))
    assert "`source ~/'my env/bin/activate'`" in sky_program_check("cloud").advice
