"""Training continues when the reader of its output has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.runtime.console import broken_pipe_safe, one_line, say, visible

ROOT = Path(__file__).resolve().parents[2]
PRINTS = """
import os, sys
from finetune.runtime.console import broken_pipe_safe
with broken_pipe_safe():
    print("read", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        print("unread", flush=True)
        print("unread", file=sys.stderr)
        os.write(1, b"by C code")
print("after the block")
sys.exit(7)
"""


def test_prints_to_a_closed_pipe_do_not_end_a_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == b"read\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7


def test_a_log_on_a_full_disk_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with broken_pipe_safe():
            print("lost", file=sys.stderr, flush=True)
        assert sys.stderr is full
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that closing it can empty its buffer


def test_what_can_be_printed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with broken_pipe_safe():
        print("to stdout")
        print("to stderr", file=sys.stderr)
        assert sys.stdout.encoding and not sys.stdout.closed
    assert capsys.readouterr() == ("to stdout\n", "to stderr\n")


def test_sigterm_still_saves_when_the_log_has_no_reader(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """SIGTERM comes to all processes of a machine, the reader of our output first."""
    config = tiny_config(training={"max_steps": 5000, "logging_steps": 1}, checkpoint={"save_steps": 1000})
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "train", str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run = tmp_path / "runs" / "tiny-001"
    assert process.stdout
    wait_for_steps(run, 2, process)
    process.stdout.close()
    before = steps(run)
    wait_for_steps(run, before + 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "interrupted"
    assert (run / "checkpoints" / f"step-{record['steps']['done']}" / "manifest.json").exists()


def steps(run: Path) -> int:
    try:
        return int(json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"]["done"])
    except (OSError, KeyError):
        return 0


def wait_for_steps(run: Path, wanted: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while steps(run) < wanted:
        assert process.poll() is None, f"training ended with {process.returncode}"
        assert time.monotonic() < deadline, f"step {steps(run)} after {seconds} s"
        time.sleep(0.05)


# text of others


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümläut 漢字 👍 שלום", "plain ümläut 漢字 👍 שלום"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J\x1b]0;t\x07", "\\x1b[2J\\x1b]0;t\\x07"),
        ("a\rb\x08\x00\x7f", "a\\rb\\x08\\x00\\x7f"),
        ("SELECT 1\r\nFROM t\r\r\n\r", "SELECT 1\nFROM t\\r\n\\r"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202eevil\u2066\u200f\u2028", "\\u202eevil\\u2066\\u200f\\u2028"),
        ("\ufeff\U000e0041", "\\ufeff\\U000e0041"),
    ],
)
def test_control_characters_are_visible_and_other_text_is_unchanged(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_cell_has_no_line_ends() -> None:
    assert visible("a\n\tb", one_line=True) == "a\\n\\tb"
    assert visible("a\r\nb", one_line=True) == "a\\nb"


def test_messages_do_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("left out: \x1b[31mred")
    assert capsys.readouterr().err == "left out: \\x1b[31mred\n"
    assert one_line("a\x1bb\nc") == "a\\x1bb c"
