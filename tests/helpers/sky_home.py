"""A home in which the real SkyPilot runs offline: fake credentials, a stand-in for gcloud, no network.

    env = fake_gcloud_home(tmp_path)            # environment for subprocesses: HOME is tmp_path, nothing is inherited
    lay_out_catalog(tmp_path)                   # from catalog_fixture: the prices

In one process, for many requests (about 2 s to start, then 0.05 to 0.5 s for each machine tried):

    with SkyWorker(env) as sky:
        sky.ask("optimize", task)["chosen"]     # the optimizer's first choice
        sky.ask("reachable", task)["reachable"] # every machine that it can choose, whatever is out of stock
        sky.ask("launch", task)["tried"]        # all machines requested, in order, when every zone is out of stock
        sky.ask("launch", task, stocked_out=[["us-central1-a", "T4", True], ["us-east1-c", None, None]])["launched"]

`task` is a dict as in a YAML, or a path. Each machine is a dict: machine, gpu, count, region, zone, spot; "tried" ones also
have disk_gb and disk_type, "chosen" and "reachable" ones SkyPilot's usd_per_hour (without disk). Every answer holds "sent" (the
task as sent by the client), "printed" (all output, with the policy's), and "error", "message" and "code" (of our UserError) if
SkyPilot or a policy refused. More arguments of ask():
    policy="finetune.cloud.launch.policy.CostPolicy"   applied as the client applies it; request="JOBS_LAUNCH" for other commands
    limit=3                                     the third machine requested is provisioned, whatever is in stock
    code="QUOTA_EXCEEDED", message="..."        another error than a stock-out, as Google reports it

The real commands, through the real API server (10 to 30 s to start on two cores, then 3 to 8 s a command):

    with bucket_stand_in() as (buckets, variables), sky_server(env | variables) as env:
        done = run_sky(env, folder, "launch", "--dryrun", "-y", "sky/train_t4.yaml")   # .sky.yaml of `folder` counts
        buckets.made["text2sql-me"]                                                   # even a dry run creates buckets
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.json_server import JsonHandler, serving

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent
PROJECT = "text2sql-test"
ACCOUNT = "you@example.com"
NOWHERE = "http://127.0.0.1:9"  # the port `discard`: connections are refused at once

GCLOUD = r"""#!/bin/sh
# Stand-in for Google's gcloud. Quotas are lines "METRIC LIMIT" in ~/quotas; without that file all quotas suffice.
echo "$@" >> "$HOME/gcloud.log"
case "$*" in
    "auth list"*) echo ACCOUNT ;;
    "config get project"* | "config get-value project"*) echo PROJECT ;;
    "services list"*) for api in compute cloudresourcemanager iam tpu storage; do echo "$api.googleapis.com"; done ;;
    "compute regions describe"*)
        if [ -f "$HOME/quotas" ]; then
            while read -r metric limit; do
                printf -- '- limit: %s\n  metric: %s\n  usage: 0.0\n' "$limit" "$metric"
            done < "$HOME/quotas"
        else
            for gpu in A100 A100_80GB H100 L4 T4 V100; do
                printf -- '- limit: 8.0\n  metric: NVIDIA_%s_GPUS\n  usage: 0.0\n' "$gpu"
                printf -- '- limit: 8.0\n  metric: PREEMPTIBLE_NVIDIA_%s_GPUS\n  usage: 0.0\n' "$gpu"
            done
        fi ;;
    *) echo "gcloud stand-in: not known: $*" >&2; exit 1 ;;
esac
"""


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_gcloud_home(home: Path, *, pythonpath: Path | None = None) -> dict[str, str]:
    """Write into `home` a fake login to Google Cloud that SkyPilot accepts, and stand-ins for gcloud and rsync.

    Returns:
        The whole environment for subprocesses. It names no other folder of the user, and every proxy variable points to
        NOWHERE, so nothing reaches the network except 127.0.0.1. `pythonpath` is for a test's own modules.
    """
    gcloud = home / ".config" / "gcloud"
    (gcloud / "configurations").mkdir(parents=True)
    (gcloud / "active_config").write_text("default")
    (gcloud / "configurations" / "config_default").write_text(f"[core]\naccount = {ACCOUNT}\nproject = {PROJECT}\n")
    for name in ("access_tokens.db", "credentials.db"):
        (gcloud / name).touch()
    login = {"type": "authorized_user", "client_id": "none", "client_secret": "none", "refresh_token": "none"}
    (gcloud / "application_default_credentials.json").write_text(json.dumps(login | {"quota_project_id": PROJECT}))
    wheel = home / ".sky" / "wheels" / "none" / f"skypilot-{version('skypilot')}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()  # without it SkyPilot builds a wheel of itself, with pip and the network, even for a dry run
    os.utime(wheel, times=(time.time() + 1e8,) * 2)
    (home / "bin").mkdir()
    program(home / "bin" / "gcloud", GCLOUD.replace("ACCOUNT", ACCOUNT).replace("PROJECT", PROJECT))
    program(
        home / "bin" / "rsync", "#!/bin/sh\nexit 0\n"
    )  # SkyPilot checks that it exists before it requests a machine
    env = {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(home / "bin"), sysconfig.get_path("scripts"), "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        "TMPDIR": str(home),
        "USER": "tester",
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
    }
    return env | ({"PYTHONPATH": str(pythonpath)} if pythonpath else {})


class SkyWorker:
    """A process that runs the real SkyPilot; see the module docstring. Its log is printed if it dies."""

    def __init__(self, env: dict[str, str], cwd: Path | None = None) -> None:
        self.env, self.cwd = env, cwd or Path(env["HOME"])

    def __enter__(self) -> SkyWorker:
        command = [sys.executable, str(HERE / "sky_worker.py")]
        self.log = (Path(self.env["HOME"]) / "worker.log").open("w+", encoding="utf-8")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=self.env, cwd=self.cwd, stdin=pipe, stdout=pipe, stderr=self.log, text=True
        )
        return self

    def ask(self, op: str, task: Json | Path, **more: Any) -> Json:
        """Args:
            op: "optimize", "reachable" or "launch".
            task: a task as in a YAML, or the path of one.

        Returns: the answer, as described in the module docstring.
        """
        what: Json = {"yaml": str(task)} if isinstance(task, Path) else {"task": task}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"op": op} | what | more) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise AssertionError(f"the worker died:\n{self.log.read()}")
        reply: Json = json.loads(line)
        return reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.log.close()


def run_sky(env: dict[str, str], cwd: Path, *args: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run the real command `sky ARGS` in a folder, with `typed` as its standard input, for three minutes at most."""
    command = ["sky", *args]
    return subprocess.run(
        command, env=env, cwd=cwd, input=typed, capture_output=True, text=True, timeout=180, check=False
    )


@contextmanager
def sky_server(env: dict[str, str], cwd: Path | None = None) -> Iterator[dict[str, str]]:
    """SkyPilot's API server for this home on a free port, with GCP enabled; stopped with all its children at the end.

    Args:
        env: of `fake_gcloud_home`, also with STORAGE_EMULATOR_HOST; cwd: where it is started (it reads no .sky.yaml there).

    Yields: the environment with which `run_sky` finds the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = env | {"SKYPILOT_API_SERVER_LOCAL_PORT": str(port)}
    home = Path(env["HOME"])
    login = home / ".config" / "gcloud" / "application_default_credentials.json"
    away = login.rename(
        login.with_suffix(".away")
    )  # without it the check at the server's start fails at once, without a request
    log_path = home / "server.log"
    with log_path.open("w") as log:
        start = ["sky", "api", "start", "--foreground"]
        server = subprocess.Popen(start, env=env, cwd=cwd or home, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/health", server, log_path)
        _wait_for(f"http://127.0.0.1:{port}/api/get?request_id=skypilot-server-on-boot-check", server, log_path)
        away.rename(login)
        subprocess.run([sys.executable, str(HERE / "sky_worker.py"), "--enable-gcp"], env=env, check=True, timeout=60)
        yield env
    finally:
        run_sky(env, home, "api", "stop")
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, minutes: float = 3) -> None:
    """Wait until the server answers, with whatever status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        try:
            opener.open(url, timeout=60).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert server.poll() is None, f"the API server ended:\n{log.read_text()}"
            time.sleep(0.2)
    raise AssertionError(f"the API server does not answer:\n{log.read_text()}")


class Buckets:
    """Stand-in for Google Cloud Storage: buckets by name, with the request that created them. objects: names that every bucket
    is said to hold; none is stored."""

    def __init__(self) -> None:
        self.made: dict[str, Json] = {}
        self.forbidden: set[str] = set()
        self.objects: set[str] = set()
        self.asked: list[str] = []


@contextmanager
def bucket_stand_in() -> Iterator[tuple[Buckets, dict[str, str]]]:
    """A local Google Cloud Storage without buckets. Yields it and the variables with which SkyPilot uses it:

    with bucket_stand_in() as (buckets, variables), sky_server(env | variables) as env: ...
    """
    buckets = Buckets()

    class Handler(JsonHandler):
        def answer(self) -> tuple[int, Json]:
            path = urlsplit(self.path).path
            if self.command == "POST":
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                buckets.asked.append(f"POST {path} {body['name']}")
                buckets.made[body["name"]] = body
                return 200, body
            buckets.asked.append(f"GET {path}")
            name, _, held = path.removeprefix("/storage/v1/b/").partition("/o/")
            if held:
                there = unquote(held) in buckets.objects
                return (
                    (200, {"name": unquote(held)}) if there else (404, {"error": {"code": 404, "message": "no object"}})
                )
            if name in buckets.forbidden:
                return 403, {"error": {"code": 403, "message": "does not have storage.buckets.get access"}}
            found = buckets.made.get(name)
            return 200 if found else 404, found or {"error": {"code": 404, "message": f"no bucket {name}"}}

    with serving(Handler) as address:
        yield buckets, {"STORAGE_EMULATOR_HOST": address}
