"""The real SkyPilot, with its own home, API server and login, pointed at the emulated cloud from outside."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.emulated_cloud.machine_image import registry_env
from tests.emulated_cloud.orphans import end_processes
from tests.emulated_cloud.pace import patience
from tests.helpers.catalog_fixture import lay_out_catalog, shared_catalog

HERE = Path(__file__).resolve().parent
PROJECT = "text2sql-test"
ACCOUNT = "you@example.com"
CONFIG = "jobs:\n  controller:\n    consolidation_mode: true\n"
API_SERVER_GB = "10"
"""The memory that the API server assumes. For 24 GB it starts 61 processes for short requests; for 6 GB it starts 6, all busy
with its own daemons, and each request waits five seconds for a new process (measured)."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Done:
    """A command that has ended: its output, and how long it took in seconds."""

    command: str
    code: int
    out: str
    seconds: float

    def ok(self) -> Done:
        """Returns itself. Raises AssertionError unless the command succeeded."""
        assert self.code == 0, f"{self.command}: exit code {self.code} after {self.seconds:.0f} s\n{self.out[-6000:]}"
        return self


def make_home(home: Path, user: str) -> None:
    """Writes a made-up login to Google Cloud, SkyPilot's settings, its price catalog and its `user` hash."""
    gcloud = home / ".config" / "gcloud"
    (gcloud / "configurations").mkdir(parents=True)
    (gcloud / "active_config").write_text("default")
    (gcloud / "configurations" / "config_default").write_text(f"[core]\naccount = {ACCOUNT}\nproject = {PROJECT}\n")
    for name in ("access_tokens.db", "credentials.db"):
        (gcloud / name).touch()
    login = {"type": "authorized_user", "client_id": "none", "client_secret": "none", "refresh_token": "none"}
    (gcloud / "application_default_credentials.json").write_text(json.dumps(login | {"quota_project_id": PROJECT}))
    lay_out_catalog(home, source=shared_catalog())
    (home / ".sky" / "config.yaml").write_text(CONFIG)
    (home / ".sky" / "user_hash").write_text(user)
    (home / "bin").mkdir()
    for program in ("gcloud", "gsutil", "ft_storage.py"):
        shutil.copy(HERE / "programs" / program, home / "bin")
    (home / "tmp").mkdir()


def environment(home: Path, api: str, bucket: str) -> dict[str, str]:
    """All environment variables of SkyPilot's processes. api, bucket: URLs of the emulated cloud."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(home / "bin"), sysconfig.get_path("scripts"), SYSTEM_PATH]),
        "PYTHONPATH": str(HERE / "hook"),
        "LANG": "C.UTF-8",
        "TMPDIR": str(home / "tmp"),
        "USER": "you",
        "FT_CLOUD_API": api,
        "FT_CLOUD_ACCOUNT": ACCOUNT,
        "FT_CLOUD_LOGIN": str(home / "login"),
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "STORAGE_EMULATOR_HOST": bucket,
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "SKYPILOT_POD_MEMORY_GB_LIMIT": API_SERVER_GB,
        "SKYPILOT_API_SERVER_LOCAL_PORT": str(port),
        "no_proxy": "*",
        **registry_env(),
    }


class SkyPilot:
    """Its API server runs from `start` to `stop`. env: the environment of its commands."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home, self.env = home, env
        self.server: subprocess.Popen[bytes] | None = None

    def start(self, cwd: Path | None = None) -> None:
        log = self.home / "server.log"
        with log.open("ab") as output:
            self.server = subprocess.Popen(
                ["sky", "api", "start", "--foreground"], env=self.env, cwd=cwd or self.home, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._wait(f"http://127.0.0.1:{self.env['SKYPILOT_API_SERVER_LOCAL_PORT']}/api/health", log)

    def stop(self) -> None:
        """Stops the server and every process that it has started."""
        self.run("api", "stop", timeout=60)
        end_processes(self.home.parent)
        if self.server:
            self.server.wait(timeout=patience(30))

    def run(self, *words: str, cwd: Path | None = None, typed: str = "", timeout: float = 600, **env: str) -> Done:
        """`sky WORDS`, with `typed` as its standard input. Raises AssertionError with its output after `timeout` seconds, scaled
        by pace.py."""
        return self.program("sky", *words, cwd=cwd, typed=typed, timeout=timeout, **env)

    def program(self, *words: str, cwd: Path | None = None, typed: str = "", timeout: float = 600, **env: str) -> Done:
        """Like `run`, for any program of the Python environment that has SkyPilot."""
        began = time.monotonic()
        command = " ".join(words)
        process = subprocess.Popen(
            words, env=self.env | env, cwd=cwd or self.home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(typed, timeout=patience(timeout))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            raise AssertionError(f"{command}: not done in {patience(timeout):.0f} s\n{out[-6000:]}") from None
        seconds = time.monotonic() - began
        print(f"{time.strftime('%X')} after {seconds:.1f} s, exit code {process.returncode}: {command[:100]}")
        return Done(command, process.returncode, out, seconds)

    @contextmanager
    def ssh(self, cluster: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`ssh OPTIONS CLUSTER` while the block runs. OpenSSH takes the home folder from the system, not from HOME, so config and
        key are given explicitly."""
        key = self.home / ".sky" / "generated" / "ssh-keys" / f"{cluster}.key"
        command = ["ssh", "-F", str(self.home / ".ssh" / "config"), "-i", str(key), *options, cluster]
        process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=patience(30))

    def expire_login(self, expired: bool = True) -> None:
        """Makes Google refuse the login as expired."""
        (self.home / "login").write_text("expired" if expired else "")

    def python(self, script: str, timeout: float = 120) -> str:
        """Runs a Python script in SkyPilot's environment and returns what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def _wait(self, url: str, log: Path, seconds: float = 300) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + patience(seconds)
        while time.monotonic() < deadline:
            try:
                opener.open(url, timeout=30).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.server and self.server.poll() is None, f"the API server ended:\n{log.read_text()[-4000:]}"
                time.sleep(0.2)
        raise AssertionError(f"the API server does not answer:\n{log.read_text()[-4000:]}")
