"""Colours and escape codes, in a real terminal and without one: NO_COLOR, TERM=dumb, FORCE_COLOR, pipes."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune.budget.ledger import Ledger
from finetune.machine.price import MachinePrice
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.report_fixtures import build_run, change, spending

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = str(ROOT / "configs" / "mistral_7b_qlora.yaml")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;[0-9;]+|4[0-7])[0-9;]*m")
SETTINGS = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR", "COLORTERM", "COLUMNS", "LINES", "TTY_COMPATIBLE")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """In training, on its seventh machine."""
    run = build_run(tmp_path / "runs/mine", questions=40)
    (run / "config.yaml").touch()
    change(
        run / "run.json",
        status="running",
        steps={"done": 60, "planned": 240},
        spending=spending()["spending"],
        peak_memory_gib={"value": 3.25, "kind": "cuda reserved"},
        tokens_per_second=500.0,
        tokens={"trained": 60_000},
    )
    for number in range(1, 8):
        log = Ledger(run / "ledger").new_attempt(
            number, machine={"gpu": "NVIDIA A100-SXM4-40GB", "spot": True, "zone": "us-east4-a"},
            price=MachinePrice(1.2, "catalog"), resumed_step=0,
        )  # fmt: skip
        log.begin(0.0)
        log.heartbeat(3600.0, 10 * number)
        if number in (2, 5):
            log.note("preempted")
            log.end(3600.0, "interrupted", 10 * number)
    return run


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {"TERM": "xterm-256color", "HOME": str(home), "PYTHONPATH": str(ROOT)} | more


def in_terminal(
    words: list[str],
    home: Path,
    until: str | None = None,
    size: tuple[int, int] = (120, 50),
    settings: dict[str, str] | None = None,
) -> str:
    """What a command writes to a terminal of so many columns and rows, up to its end or, with `until`, to that text twice."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    program = [sys.executable, "-m", "finetune", *words]
    process = subprocess.Popen(
        program,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment(home, **(settings or {})),
        cwd=home,
        start_new_session=True,
    )
    os.close(inner)
    found, end = "", time.monotonic() + 120
    decode = codecs.getincrementaldecoder("utf-8")().decode  # a character may come in two pieces
    try:
        while time.monotonic() < end and not (until and found.count(until) > 1):
            if select.select([terminal], [], [], 0.5)[0]:
                try:
                    found += decode(os.read(terminal, 65536))
                except OSError:  # the other end is closed
                    break
        if until:
            assert found.count(until) > 1, found
            process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 1)
    finally:
        process.kill()
        os.close(terminal)
    return found


def piped(words: list[str], home: Path, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words],
        capture_output=True,
        text=True,
        env=environment(home, **more),
        cwd=home,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


def commands(run: Path) -> list[list[str]]:
    return [
        ["plan", SHIPPED], ["plan", SHIPPED, "--memory"], ["sweep", SHIPPED, "lora.r=8,16", "--plan"], ["doctor"],
        ["runs", str(run.parent)], ["watch", str(run), "--once"], ["config", SHIPPED], ["report", str(run)], ["--help"],
    ]  # fmt: skip


def test_tables_have_no_escape_codes_in_a_terminal_or_a_pipe(run: Path, tmp_path: Path) -> None:
    lay_out_catalog(tmp_path, fetched=datetime.now(UTC))
    for words in commands(run):
        assert "\x1b" not in in_terminal(words, tmp_path), words
        assert "\x1b" not in piped(words, tmp_path, FORCE_COLOR="1", CLICOLOR_FORCE="1"), words


@pytest.mark.parametrize(("setting", "coloured"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "0"}, False)])
def test_the_live_view_has_colours_unless_no_color_is_set(
    setting: dict[str, str], coloured: bool, run: Path, tmp_path: Path
) -> None:
    """NO_COLOR counts with any value but an empty one (no-color.org)."""
    shown = in_terminal(["watch", str(run), "--every", "0.2"], tmp_path, until="attempt 7", settings=setting)
    assert bool(COLOUR.search(shown)) == coloured
    assert "running, last heard of" in shown


@pytest.mark.parametrize("setting", [{"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {}])
def test_without_a_terminal_the_view_is_printed_once_and_plain(
    setting: dict[str, str], run: Path, tmp_path: Path
) -> None:
    assert piped(["watch", str(run)], tmp_path, **setting).startswith("status ")
    assert "\x1b" not in piped(["watch", str(run)], tmp_path, **setting)


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(run: Path, tmp_path: Path) -> None:
    shown = in_terminal(["watch", str(run)], tmp_path, settings={"TERM": "dumb"})
    assert shown.startswith("status ") and "attempt 7" in shown and "\x1b" not in shown


@pytest.mark.parametrize(("size", "attempts"), [((80, 24), 3), ((200, 50), 6)])
def test_the_whole_view_fits_the_terminal(size: tuple[int, int], attempts: int, run: Path, tmp_path: Path) -> None:
    """Of the attempts as many as there is room for, the live one always."""
    shown = in_terminal(["watch", str(run), "--every", "0.2"], tmp_path, until="╰", size=size)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    last = plain[plain.index("╭") : plain.index("╯")]
    lines = [line.strip() for line in last.splitlines()]
    assert len(lines) < size[1] and all(len(line) <= size[0] for line in lines)
    whole = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    for text in (
        "60 of 240", "loss", "validation", "tokens/s (measured)", "GiB at the peak", "of $10.00", "at the end (estimated)",
        "7, 2 preempted, 4 ended without notice", "attempt 7", "to step 70: running", "left (estimated)",
    ):  # fmt: skip
        assert text in whole, (text, whole)
    assert whole.count("attempt ") == attempts and "..." not in whole
