"""Starts the processes of an emulated machine in namespaces of their own; `machine_init` is what runs first in there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.emulated_cloud.pace import patience

HERE = Path(__file__).resolve().parent
UNSHARE = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private"]


class Booted:
    """A running set of namespaces with a root of its own.

    Args:
        settings: as `machine_init.main` reads them.
        own_network: False keeps the network of the computer, for preparing an image.
    """

    def __init__(self, settings: dict[str, Any], *, own_network: bool) -> None:
        self.settings = settings
        folder = Path(settings["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "init.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        self.log = (folder / "init.log").open("ab")
        command = [*UNSHARE, *(["--net"] if own_network else []), sys.executable, "-S", "-E"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*command, str(HERE / "machine_init.py"), str(path)], stdin=pipe, stdout=pipe, stderr=self.log, text=True
        )
        self._expect("namespaces")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.init = int(children.split()[0])
        """The first process of the machine, as this computer numbers it."""

    def say(self, line: str) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone already

    def boot(self) -> None:
        """Mounts, network and services. Raises AssertionError with the machine's log if that fails."""
        self.say("network")
        self._expect("up")

    def power_off(self) -> None:
        """At once and for all of its processes, as pulling the plug."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=patience(30))
        deadline = time.monotonic() + patience(
            10
        )  # --kill-child is carried out by the kernel, not waited for by anybody
        while Path(f"/proc/{self.init}/ns/pid").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass

    def run(
        self, command: Sequence[str], *, user: str = "root", env: dict[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, in its namespaces and root."""
        inside = ["nsenter", "--target", str(self.init), "--all", "--root", "--wd", "--"]
        as_user = [] if user == "root" else ["runuser", "-u", user, "--"]
        return subprocess.run(
            [*inside, *as_user, *command],
            capture_output=True,
            text=True,
            env=env,
            timeout=patience(timeout),
            check=False,
        )

    def _expect(self, word: str) -> None:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if line != word:
            log = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
            raise AssertionError(f"the machine said {line!r} instead of {word!r}:\n{log[-3000:]}")
