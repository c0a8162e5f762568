"""Google Cloud Storage for the emulated cloud: PyPI's gcp-storage-emulator, in a process of its own (bucket_server)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from tests.emulated_cloud.bucket_server import FORBIDDEN, TESTS_OWN
from tests.emulated_cloud.pace import patience

HERE = Path(__file__).resolve().parent
PORT = 9023


class Buckets:
    """address: where the machines reach it. folder: for the objects; packages: where the emulator is installed if it is
    missing."""

    def __init__(self, address: str, folder: Path, packages: Path) -> None:
        self.url = f"http://{address}:{PORT}"
        folder.mkdir(parents=True, exist_ok=True)
        self._forbidden = folder / "forbidden.json"
        self.allow()
        env = {"PATH": os.environ["PATH"], "HOME": f"{folder}/", "STORAGE_BASE": str(folder), "STORAGE_DIR": "objects"}
        env[FORBIDDEN] = str(self._forbidden)
        if importlib.util.find_spec("gcp_storage_emulator") is None:
            install(packages)
            env["PYTHONPATH"] = str(packages)
        command = [
            sys.executable,
            str(HERE / "bucket_server.py"),
            "start",
            "--host",
            address,
            "--port",
            str(PORT),
            "--quiet",
        ]
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(command, env=env, cwd=folder, stdout=self.log, stderr=self.log)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._opener.addheaders = [(TESTS_OWN, "1")]
        deadline = time.monotonic() + patience(30)
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, Path(self.log.name).read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(timeout=patience(30))
        self.log.close()

    def forbid(self, bucket: str, *permissions: str) -> None:
        """From now on requests that need one of `permissions` (such as storage.objects.create) get a 403, except a test's own;
        without `permissions` all requests do, as for a bucket of another project."""
        self._forbid(self._denied() | {bucket: list(permissions)})

    def allow(self, bucket: str | None = None) -> None:
        """Allows everything again; None: for all buckets."""
        self._forbid({name: what for name, what in self._denied().items() if bucket not in (None, name)})

    def _denied(self) -> dict[str, list[str]]:
        return dict(json.loads(self._forbidden.read_text(encoding="utf-8"))) if self._forbidden.exists() else {}

    def _forbid(self, denied: dict[str, list[str]]) -> None:
        partial = self._forbidden.with_suffix(".part")
        partial.write_text(json.dumps(denied), encoding="utf-8")
        partial.replace(self._forbidden)

    def names(self) -> list[str]:
        """The names of all buckets."""
        return [row["name"] for row in self._json("/storage/v1/b?project=any").get("items", [])]

    def make(self, bucket: str) -> None:
        body = json.dumps({"name": bucket}).encode()
        head = {"Content-Type": "application/json"}
        self._opener.open(
            urllib.request.Request(f"{self.url}/storage/v1/b?project=any", body, head), timeout=60
        ).close()

    def objects(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of a bucket's objects that begin with `prefix`, sorted."""
        answer = self._json(f"/storage/v1/b/{bucket}/o?prefix={quote(prefix)}")
        return sorted(row["name"] for row in answer.get("items", []))

    def read(self, bucket: str, name: str) -> bytes:
        with self._opener.open(
            f"{self.url}/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media", timeout=60
        ) as answer:
            return bytes(answer.read())

    def delete(self, bucket: str, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/storage/v1/b/{bucket}/o/{quote(name, safe='')}", method="DELETE")
        self._opener.open(request, timeout=60).close()

    def updated(self, bucket: str, name: str) -> float:
        """When the object was last written, in seconds since the epoch, by the bucket's clock."""
        about = self._json(f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return datetime.fromisoformat(str(about["updated"])).timestamp()

    def _json(self, path: str) -> dict[str, list[dict[str, str]]]:
        with self._opener.open(self.url + path, timeout=60) as answer:
            return dict(json.load(answer))

    def _answers(self) -> bool:
        try:
            self._opener.open(self.url + "/", timeout=5).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


def requirement() -> str:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("#")[0].strip() for line in lines if line.startswith("gcp-storage-emulator=="))


def install(packages: Path) -> None:
    if (packages / "gcp_storage_emulator").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), requirement()]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the bucket's emulator could not be installed: {done.stderr[-2000:]}"
