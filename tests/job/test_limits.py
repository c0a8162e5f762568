"""How a limited program ends, with real processes: exit code, time limit, signals, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.job import _end
from finetune.job import evaluate as job_evaluate
from finetune.job import limits
from finetune.job.limits import Ended, hours_left, run_limited
from finetune.job.programs import ProgramFailed, call, tensorboard
from finetune.job.settings import JobSettings, read_settings
from tests.helpers.errors import raises
from tests.helpers.machine_fixture import gone, wait_for

ROOT = Path(__file__).resolve().parents[2]
HOUR = 1.0
SECOND = 1 / 3600


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSettings:
    monkeypatch.chdir(tmp_path)  # without on_machine/room.sh
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRACE_SECONDS", "0.5")
    (tmp_path / ".finetune").mkdir()
    return read_settings(os.environ)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def fills(settings: JobSettings) -> str:
    """A program that does what on_machine/room.sh does on a full disk, but for SIGTERM."""
    return f"import os; open({str(settings.state)!r} + f'/room.{{os.getpid()}}.full', 'w').write('12'); "


def gone_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def wait_a_moment(process: subprocess.Popen[str]) -> bool:
    """Whether it has ended, a moment later."""
    time.sleep(0.05)
    return process.poll() is not None


@pytest.mark.parametrize(
    ("program", "code"), [("", 0), ("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_that_of_the_program_as_in_a_shell(program: str, code: int, settings: JobSettings) -> None:
    assert run_limited(python(program), HOUR, settings) == Ended(code, out_of_time=False)


def test_a_program_whose_time_is_up_gets_sigterm_and_then_sigkill(settings: JobSettings) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert run_limited(python(deaf), 0.5 * SECOND, settings) == Ended(137, out_of_time=True)
    assert time.monotonic() - began >= 1.0, "half a second, and half a second of grace"


def test_a_program_that_does_not_end_on_a_full_disk_is_killed(settings: JobSettings) -> None:
    """SIGTERM came from on_machine/room.sh."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert run_limited(python(deaf + fills(settings) + "time.sleep(60)"), HOUR, settings) == Ended(2, False)


def test_a_full_disk_is_not_retried(settings: JobSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_limited(python(fills(settings) + "exit(75)"), HOUR, settings) == Ended(2, False)
    assert "the disk was nearly full (12 MiB left)" in capsys.readouterr().err
    assert not list(settings.state.glob("room.*"))


def test_what_the_disk_watcher_of_another_program_wrote_does_not_count(settings: JobSettings) -> None:
    dead, alive = gone_process(), os.getpid()
    for name in (f"room.{dead}", f"room.{dead}.full", f"room.{alive}", f"room.{alive}.full"):
        (settings.state / name).write_text("12")
    assert run_limited(python("import time; time.sleep(0.5); exit(75)"), HOUR, settings) == Ended(75, False)
    left = {path.name for path in settings.state.glob("room.*")}
    assert left == {f"room.{alive}", f"room.{alive}.full"}, "the reserve of a machine that was switched off is freed"


TWO_JOBS = """
import os
import sys
from pathlib import Path
from finetune.job.limits import run_limited
from finetune.job.settings import read_settings
program = '''
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"runs.{sys.argv[1]}").touch()
while not pathlib.Path("end").exists():
    time.sleep(0.05)
'''
ended = run_limited([sys.executable, "-c", program, sys.argv[1]], 1.0, read_settings(os.environ))
print(ended.code, ended.interrupted, flush=True)
"""
DISK = """#!/bin/sh
case "$*" in
    *output=size*) echo 2000 ;;
    *) echo $(($(cat free) - 20 * $(ls .finetune | grep -c '^room[.][0-9]*$'))) ;;
esac
"""


def test_of_two_jobs_on_a_disk_that_gets_full_none_is_killed_without_saving(
    settings: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real on_machine/room.sh, and a disk of 2000 MiB of which a reserve takes 20."""
    (tmp_path / "on_machine").symlink_to(ROOT / "on_machine")
    for name, text in (("df", DISK), ("fallocate", '#!/bin/sh\ntouch "$3"\n')):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GRACE_SECONDS", "3")
    (tmp_path / "free").write_text("100")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_JOBS, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for name in "ab"
    ]
    for name in "ab":
        wait_for(tmp_path / f"runs.{name}")
    time.sleep(1)  # so that both watch the disk
    (tmp_path / "free").write_text("55")  # 15 beside two reserves: one of the jobs has to end
    first = next(one for _ in range(600) for one in started if wait_a_moment(one))
    time.sleep(3.5)  # longer than the grace period of the other
    (tmp_path / "end").touch()
    said = [one.communicate(timeout=30)[0].split() for one in started]
    assert said[started.index(first)] == ["saved", "2", "False"]
    assert sorted(said)[0] in (["0", "False"], ["saved", "2", "False"]), (
        "the other goes on, or was stopped at the same moment"
    )
    assert not list(settings.state.glob("room.*.full"))


def test_signal_handlers_are_restored_afterwards(settings: JobSettings) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_limited(python(""), HOUR, settings)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def started_and_signalled(monkeypatch: pytest.MonkeyPatch, when: str) -> list[subprocess.Popen[bytes]]:
    """The start of the next program sends this process a SIGTERM just before or after it exists, before Popen returns."""
    start: Any = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def signalled(*words: object, **more: object) -> subprocess.Popen[bytes]:
        monkeypatch.setattr(subprocess, "Popen", start)
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(start(*words, **more))
        if when == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", signalled)
    return started


@pytest.fixture
def job_that_ends() -> Iterator[None]:
    """SIGTERM ends this process, as in `finetune job`."""
    before = signal.signal(signal.SIGTERM, _end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_during_the_start_of_the_limited_program_is_not_lost(
    when: str, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.job.limits._watch_room", lambda *_: None)
    started_and_signalled(monkeypatch, when)
    assert run_limited(python("import time; time.sleep(60)"), HOUR, settings) == Ended(
        143, out_of_time=False, signalled=True
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_during_the_start_of_a_needed_program_leaves_no_process(
    when: str, settings: JobSettings, monkeypatch: pytest.MonkeyPatch, job_that_ends: None
) -> None:
    started = started_and_signalled(monkeypatch, when)
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        call(python("import time; time.sleep(20)"), settings.environment)
    assert ended.value.code == 143 and time.monotonic() - began < 15
    assert all(gone(program.pid) for program in started)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_during_the_start_of_tensorboard_leaves_no_process(
    when: str, settings: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_that_ends: None
) -> None:
    program = tmp_path / "tensorboard"
    program.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")  # where the program is found
    started = started_and_signalled(monkeypatch, when)
    with pytest.raises(SystemExit), tensorboard(read_settings(os.environ)):
        pytest.fail("the signal was lost")
    for one in started:
        assert one.wait(15) == -signal.SIGTERM


def test_the_disk_watcher_is_detached_and_ends_with_the_program(settings: JobSettings) -> None:
    script = Path("on_machine") / "room.sh"
    script.parent.mkdir()
    script.write_text('echo "$$ $PPID $1 $2" >"$2.started"; while kill -0 "$1"; do sleep 0.1; done\n', encoding="utf-8")
    program = f"""import os, time
while not os.path.exists({str(settings.state)!r} + f"/room.{{os.getpid()}}.started"): time.sleep(0.02)
time.sleep(0.3)"""
    assert run_limited(python(program), HOUR, settings).code == 0
    [started] = settings.state.glob("room.*.started")
    watcher, parent, process, file = started.read_text(encoding="utf-8").split()
    assert int(parent) != os.getpid() and file == str(settings.state / f"room.{process}")
    assert gone(int(watcher))


def test_a_program_that_the_job_needs_ends_with_the_job(
    settings: JobSettings, tmp_path: Path, job_that_ends: None
) -> None:
    def interrupt() -> None:
        wait_for(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit):
        call(["bash", "-c", "echo $$ >part; mv part pid; exec sleep 60"], settings.environment)
    thread.join()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_failing_program_reports_its_exit_code(settings: JobSettings) -> None:
    with pytest.raises(ProgramFailed) as failed:
        call(python("exit(2)"), settings.environment)
    assert failed.value.code == 2


def test_an_evaluation_that_takes_too_long_is_an_error(
    settings: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, mount=tmp_path, run_name="mine")
    run = settings.runs / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    monkeypatch.setattr(job_evaluate, "score", lambda *_: Ended(143, out_of_time=True))
    with raises("job.out_of_time", match="^not scored in 24.0000 hours.*--env RUN_NAME=mine, which goes on"):
        job_evaluate.evaluate(settings)


def test_data_without_databases_cannot_be_scored(
    settings: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, mount=tmp_path, run_name="mine")
    (settings.runs / "mine").mkdir(parents=True)
    (settings.runs / "mine" / "config.yaml").touch()
    monkeypatch.setattr(job_evaluate, "score", lambda *_: None)
    with raises("data.no_database", match="runs/mine: there is no question whose SQL can be executed"):
        job_evaluate.evaluate(settings)


@dataclass
class Reached:
    """A limit that is reached once the file is there, and then overdue, too, if it is to be."""

    file: Path
    at_once: bool = False

    @property
    def over(self) -> str:
        return "the money" if self.file.exists() else ""

    @property
    def overdue(self) -> bool:
        return self.at_once and self.file.exists()


def test_another_limit_ends_the_program_which_may_save(settings: JobSettings, tmp_path: Path) -> None:
    saves = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); "
    starts = f"open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(60)"
    ended = run_limited(python(saves + starts), HOUR, settings, limit=Reached(tmp_path / "ready"))
    assert ended == Ended(75, out_of_time=False, over="the money") and not ended.interrupted


def test_at_another_limit_that_is_overdue_the_program_is_killed(settings: JobSettings, tmp_path: Path) -> None:
    settings = replace(settings, grace_seconds=Decimal(50))
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    starts = f"open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(60)"
    began = time.monotonic()
    limit = Reached(tmp_path / "ready", at_once=True)
    assert run_limited(python(deaf + starts), HOUR, settings, limit=limit).code == 137
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("ended", "interrupted"),
    [
        (Ended(0, False), False),
        (Ended(1, False), False),
        (Ended(75, False), False),  # it says so itself
        (Ended(143, False), True),
        (Ended(130, False), True),
        (Ended(137, False), False),  # out of memory
        (Ended(137, False, signalled=True), True),  # the grace period was over
        (Ended(0, False, signalled=True), False),
        (Ended(143, True), False),
        (Ended(143, False, over="the money"), False),
    ],
)
def test_what_counts_as_an_interruption(ended: Ended, interrupted: bool) -> None:
    assert ended.interrupted == interrupted


def test_hours_that_are_used_up_are_an_error(settings: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "wall_hours", lambda *_, **__: 0.0)
    with raises("budget.exhausted", match="^MAX_RUN_USD=25 is used up .* no run has been billed for"):
        hours_left(settings)
    with raises("budget.exhausted", match="used up by the hours that this machine has run; raise it"):
        hours_left(settings, of_machine=True)


def test_hours_without_a_price_are_max_hours(settings: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    assert hours_left(settings) == 24.0
