"""Completion in real shells, with the installed program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent


def completed(shell: str, script: str, cwd: Path) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_bash(line: str, cwd: Path) -> list[str]:
    words = line.split(" ")
    script = f"""
        eval "$(finetune completion bash)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9 COMP_CWORD={len(words) - 1}
        COMP_WORDS=({" ".join(words[:-1])} '{words[-1]}')
        _python_argcomplete finetune
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return [word.strip() for word in completed("bash", script, cwd).splitlines() if word.strip()]


def test_bash_completes_commands_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "my_config.yaml").write_text("")
    assert in_bash("finetune re", tmp_path) == ["report"]
    assert set(in_bash("finetune data ", tmp_path)) >= {"prepare", "check"}
    assert in_bash("finetune evaluate --pred", tmp_path) == ["--predictions"]
    assert in_bash("finetune runs --sort sc", tmp_path) == ["score"]
    assert in_bash("finetune train my_", tmp_path) == ["my_config.yaml"]


def test_the_scripts_of_other_shells_are_read_by_them(tmp_path: Path) -> None:
    for shell in ("zsh", "fish"):
        done = subprocess.run(
            [str(PROGRAMS / "finetune"), "completion", shell], capture_output=True, text=True, check=True, timeout=60
        )
        assert "finetune" in done.stdout
    completed("fish", "finetune completion fish | source; complete -C 'finetune re' | grep -q report", tmp_path)
