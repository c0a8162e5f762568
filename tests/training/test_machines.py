"""`finetune train` on two machines, each with a torchrun of its own: here two on one computer, with separate folders for what is
local to a machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.metadata_server import MetadataServer
from tests.helpers.train_helpers import record_of

torch = pytest.importorskip("torch")

from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from tests.training.test_distributed import FUSED, HF, ROOT, STEPS, largest_difference, two  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("no_keys"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU; GPUs would be two machines of them"),
]
ConfigWriter = Callable[..., Path]
LOST_SECONDS = 45
"""In which a machine must have ended after the other one was lost: 10 s of silence after a broken connection, and the end."""
LONG = {"training": STEPS | {"kernels": "hf", "max_steps": 40, "eval_steps": 0}, "checkpoint": {"save_steps": 5}}
PAUSED = """
import sys, time
from finetune.training.step.runner import Stepper
original = Stepper.run
def run(self, step):
    time.sleep(0.3)
    return original(self, step)
Stepper.run = run
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Machines:
    """Two torchruns, called nodes by SkyPilot."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[str]]()

    def start(
        self,
        *words: str,
        script: tuple[str, ...] = ("-m", "finetune"),
        other: tuple[str, ...] | None = None,
        torchrun: tuple[str, ...] = ("-m", "finetune.runtime.torchrun"),
        **env: str,
    ) -> list[subprocess.Popen[str]]:
        """other: the words of the second machine, if they differ; env: variables of that one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank, arguments in enumerate((words, words if other is None else other)):
            scratch = self.folder / f"machine-{rank}"
            scratch.mkdir(exist_ok=True)
            place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port]
            command = [sys.executable, *torchrun, *place, "--nproc-per-node", "1", *script]
            own = env if rank else {}
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)} | own
            log = (self.folder / f"log-{rank}").open("w")
            processes.append(
                subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            )
        self.started += processes
        return processes

    def said(self, rank: int) -> list[str]:
        lines = re.split("[\r\n]+", (self.folder / f"log-{rank}").read_text())
        return [line for line in lines if line.strip() and "%|" not in line]

    def codes(self, processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[int]:
        return [process.wait(seconds) for process in processes]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    started = Machines(tmp_path)
    yield started
    started.end()


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def wait_for(ready: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def has_checkpoint(run: Path) -> bool:
    return next(checkpoint_folders.newest_first(run / "checkpoints"), None) is not None if run.is_dir() else False


@pytest.mark.parametrize(("sections", "tolerance"), [(HF, 2e-6), (FUSED, 2e-4)], ids=["hf", "fused"])
def test_two_machines_learn_what_one_does(
    sections: dict[str, dict[str, object]],
    tolerance: float,
    tiny_config: ConfigWriter,
    tmp_path: Path,
    machines: Machines,
) -> None:
    """Byte for byte what two processes of one machine learn; what one process learns within the tolerance of test_distributed.py,
    because sums over labelled tokens are then added in another order."""
    config, runs = str(tiny_config(**sections)), tmp_path / "runs"
    started = machines.start("train", config, "training.run_name=apart")
    assert machines.codes(started) == [0, 0], machines.said(0)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    together = subprocess.run(
        two("train", config, "training.run_name=together"), cwd=ROOT, env=environment, capture_output=True, check=False
    )
    assert together.returncode == 0, together.stderr
    assert adapter(runs / "apart") == adapter(runs / "together")
    assert main(["train", config, "training.run_name=one"]) == 0
    assert largest_difference(runs / "apart", runs / "one") < tolerance
    assert record_of(runs / "apart")["step"]["ranks"] == 2
    assert machines.said(1) == [], "the first process speaks for all"
    assert sorted(path.name for path in runs.iterdir()) == ["apart", "one", "together"]


READS_LATE = """
import os, sys, time
from torch.distributed.elastic.utils import store
come = store._barrier_nonblocking
def late(*args, **kwargs):
    key = come(*args, **kwargs)
    time.sleep(float(os.environ.get("LATE", 0)))
    return key
store._barrier_nonblocking = late
from finetune.runtime.torchrun import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_machine_that_keeps_the_store_ends_after_one_that_reads_late(tmp_path: Path, machines: Machines) -> None:
    torchrun, child = tmp_path / "reads_late.py", tmp_path / "child.py"
    torchrun.write_text(READS_LATE)
    child.write_text("")
    started = machines.start(torchrun=(str(torchrun),), script=(str(child),), LATE="2")
    assert machines.codes(started) == [0, 0]
    assert machines.said(0) == machines.said(1) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_machine_ends_the_other_one_and_the_run_goes_on_byte_for_byte(
    lost: int, tiny_config: ConfigWriter, tmp_path: Path, machines: Machines
) -> None:
    config, runs, script = str(tiny_config(**LONG)), tmp_path / "runs", tmp_path / "paused.py"
    script.write_text(PAUSED)
    assert machines.codes(machines.start("train", config, "training.run_name=whole")) == [0, 0]
    run = runs / "run"
    started = machines.start("train", config, "training.run_name=run", script=(str(script),))
    wait_for(lambda: has_checkpoint(run), started)
    os.killpg(started[lost].pid, signal.SIGKILL)  # torchrun and, in sessions of their own, its processes
    for process in processes_below(machines.folder / f"machine-{lost}"):
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    assert started[1 - lost].wait(LOST_SECONDS) == 75, "\n".join(machines.said(1 - lost))
    print(f"machine {lost} lost: the other one ended {time.monotonic() - began:.1f} s later")
    assert "Traceback" not in "".join(machines.said(1 - lost))
    if lost:
        assert [line for line in machines.said(0) if line.startswith("finetune: ")] == [
            "finetune: process 1, or its machine, is no longer there; the run goes on from its newest checkpoint when it is "
            "started again on all machines"
        ]
        assert record_of(run)["status"] == "interrupted"

    # the second machine does not know yet that there is such a run, and names its config
    again = machines.start("train", "--resume", str(run), other=("train", config))
    assert machines.codes(again) == [0, 0], machines.said(0)
    assert [line for line in machines.said(0) if line.startswith("resuming from")]
    assert adapter(run) == adapter(runs / "whole")


def processes_below(scratch: Path) -> list[int]:
    """The processes whose TMPDIR is this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={scratch}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_torchrun_takes_its_processes_and_the_other_machine_with_it(
    tiny_config: ConfigWriter, tmp_path: Path, machines: Machines
) -> None:
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    run = tmp_path / "runs" / "run"
    started = machines.start("train", str(tiny_config(**LONG)), "training.run_name=run", script=(str(script),))
    wait_for(lambda: has_checkpoint(run), started)
    started[1].kill()
    began = time.monotonic()
    assert started[0].wait(LOST_SECONDS) == 75, machines.said(0)
    print(f"torchrun killed: the other machine ended {time.monotonic() - began:.1f} s later")
    wait_for(lambda: not processes_below(tmp_path / "machine-1"), [], 30)
    assert record_of(run)["status"] == "interrupted"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_machine_that_falls_silent_is_lost_too(
    silent: int, tiny_config: ConfigWriter, tmp_path: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay open, as those of a machine without power do. 10 s instead of 60."""
    monkeypatch.setenv("FINETUNE_LOST_SECONDS", "10")
    run, script = tmp_path / "runs" / "run", tmp_path / "paused.py"
    script.write_text(PAUSED)
    started = machines.start("train", str(tiny_config(**LONG)), "training.run_name=run", script=(str(script),))
    wait_for(lambda: has_checkpoint(run), started)
    stopped = processes_below(tmp_path / f"machine-{silent}")
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert started[1 - silent].wait(LOST_SECONDS) == 75, machines.said(1 - silent)
        print(f"machine {silent} silent: the other one ended {time.monotonic() - began:.1f} s later")
    finally:
        for process in stopped:
            os.kill(process, signal.SIGKILL)
    if silent:
        assert record_of(run)["status"] == "interrupted"


def test_a_signal_on_the_second_machine_saves_a_checkpoint_on_the_first(
    tiny_config: ConfigWriter, tmp_path: Path, machines: Machines
) -> None:
    run = tmp_path / "runs" / "run"
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    started = machines.start("train", str(tiny_config(**LONG)), "training.run_name=run", script=(str(script),))
    wait_for(lambda: has_checkpoint(run), started)
    started[1].terminate()
    assert machines.codes(started) == [75, 75]
    record = record_of(run)
    newest = next(checkpoint_folders.newest_first(run / "checkpoints"))
    assert record["status"] == "interrupted" and newest.name == f"step-{record['steps']['done']}"
    assert checkpoint_folders.fault(newest) is None
    assert {"rng-0.pt", "rng-1.pt"} <= set(checkpoint_folders.read_manifest(newest)["files"])


def test_the_second_machine_is_preempted(tiny_config: ConfigWriter, tmp_path: Path, machines: Machines) -> None:
    run, script = tmp_path / "runs" / "run", tmp_path / "paused.py"
    script.write_text(PAUSED)
    with MetadataServer() as server:
        words = ("train", str(tiny_config(**LONG)), "training.run_name=run")
        started = machines.start(*words, script=(str(script),), GCE_METADATA_HOST=server.host)
        wait_for(lambda: has_checkpoint(run), started)
        server.set("preempted", "TRUE")
        assert machines.codes(started) == [75, 75]
    told = "Google takes another machine of this run back: finishing this step, then saving a checkpoint"
    assert told in machines.said(0)
    record = record_of(run)
    assert (record["status"], record["stop"]["reason"]) == ("interrupted", "preemption")
    assert next(checkpoint_folders.newest_first(run / "checkpoints")).name == f"step-{record['steps']['done']}"


OTHER_VERSIONS = """
import os, sys
from finetune.training import agreement
versions = agreement.package_versions
agreement.package_versions = lambda: versions() | ({"torch": "0.4"} if os.environ["RANK"] == "1" else {})
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_machines_with_other_versions_are_refused_in_one_line(
    tiny_config: ConfigWriter, tmp_path: Path, machines: Machines
) -> None:
    script = tmp_path / "other.py"
    script.write_text(OTHER_VERSIONS)
    started = machines.start("train", str(tiny_config(**LONG)), script=(str(script),))
    assert machines.codes(started) == [2, 2]
    [line] = [line for line in machines.said(0) + machines.said(1) if line.startswith("finetune: ")]
    assert line.startswith("finetune: process 1 has torch 0.4 instead of ")
    assert not (tmp_path / "runs").exists()


def test_a_machine_that_nobody_joins_says_so(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """Two seconds instead of ten minutes."""
    place = [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        "9",
        "--rdzv-conf",
        "timeout=2",
    ]
    command = [
        sys.executable,
        "-m",
        "finetune.runtime.torchrun",
        *place,
        "--nproc-per-node",
        "1",
        "-m",
        "finetune",
        "train",
    ]
    ended = subprocess.run([*command, "x.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("finetune: ")]
    assert ended.returncode == 2 and len(lines) == 1, ended.stderr
    assert lines[0].startswith("finetune: torchrun: the machines of this run did not find each other (")
