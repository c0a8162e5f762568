"""A real `mlflow server` with an SQLite store in a folder, on a free port of this computer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

START_SECONDS = 120.0
PROGRAM = "import sys; from mlflow.cli import cli; sys.exit(cli())"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class MLflowServer:
    """Can be stopped and started again, with the same store and port."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        command = [sys.executable, "-c", PROGRAM, "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/store.db"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--artifacts-destination", str(self.folder / "artifacts")],
                stdout=log, stderr=log, start_new_session=True, env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with suppress(OSError), urlopen(f"{self.address}/health", timeout=5):
                return
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)  # its worker, too
            self._process.wait()
            self._process = None

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.address)

    def runs(self, project: str) -> list[Any]:
        client = self.client()
        experiment = client.get_experiment_by_name(project)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def curve(self, run_id: str, key: str) -> list[tuple[int, float]]:
        found = self.client().get_metric_history(run_id, key)
        return sorted((metric.step, metric.value) for metric in found)
