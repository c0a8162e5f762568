"""A cloud machine for the scripts of on_machine/: a checkout, a home, a bucket, and stand-ins for the programs that
cost money.

The stand-ins record how they were called; the scripts, bash and `finetune job` are the real ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.load import load_config, to_yaml

ROOT = Path(__file__).resolve().parents[2]
SET = "data/prepared/shop"
CONFIG = """\
model: {name: some/model}
data:
  sources: [{kind: jsonl, path: data/built/train.jsonl}]
  output_dir: data/prepared/shop
"""

FINETUNE = """\
#!/usr/bin/env bash
here="$(dirname "$0")"
case $1 in
  job) exec "$here/python" -m finetune "$@" ;;  # the real one
  data)
    echo "$*" >>"$CALLS"
    mkdir -p data/prepared/shop/databases/shop
    echo '{"made": "here"}' >data/prepared/shop/manifest.json
    echo rows >data/prepared/shop/train.jsonl
    echo rows >data/prepared/shop/databases/shop/shop.sqlite
    exit ;;
esac
echo "$*" >>"$CALLS"
env | grep -E '^(WANDB|HF)_' >"$CALLS.env"
if [ "$1" = evaluate ]; then
  FAKE_WORK=${FAKE_EVALUATION:-${FAKE_WORK:-}}
  FAKE_CODE=${FAKE_EVALUATION_CODE:-${FAKE_CODE:-0}}
fi
[ -z "${FAKE_WORK:-}" ] || exec "$here/python" -c "$FAKE_WORK"
exit "${FAKE_CODE:-0}"
"""
"""$1 decides; FAKE_CODE is the exit code of what is neither a job nor data, FAKE_EVALUATION_CODE that of an evaluation alone."""

RECORDER = '#!/usr/bin/env bash\necho "${0##*/} $*" >>"$CALLS"\n'
TENSORBOARD = RECORDER + 'echo $$ >"$CALLS.tensorboard"\nexec sleep 60\n'


@dataclass
class CloudMachine:
    """A machine under `folder`. `env` is added to what the scripts see."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def bucket(self) -> Path:
        return self.folder / "bucket"

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def run_folder(self, name: str = "run") -> Path:
        return self.bucket / "runs" / name

    def calls(self) -> list[str]:
        """What the stand-ins were called with, in order; TensorBoard, which starts beside the rest, left out."""
        log = self.folder / "calls"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [line for line in lines if not line.startswith("tensorboard")]

    def called(self, command: str) -> list[str]:
        return [call for call in self.calls() if call.startswith(command)]

    def seen_environment(self) -> list[str]:
        return (self.folder / "calls.env").read_text(encoding="utf-8").splitlines()

    def environment(self) -> dict[str, str]:
        base = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "FINETUNE_MOUNT": str(self.bucket),
            "CALLS": str(self.folder / "calls"),
            "CONFIG": "config.yaml",
            "RUN_NAME": "run",
            "GRACE_SECONDS": "2",
            "GCE_METADATA_HOST": "127.0.0.1:9",  # nobody listens on the discard port
        }
        return base | self.env

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """The script as SkyPilot starts it, in the root of the checkout; its words come on stderr."""
        command = ["bash", f"on_machine/{script}", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=self.checkout,
            env=self.environment(),
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        """Exit code, and all that it said."""
        self.env |= env
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def program(self, folder: Path, name: str, text: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def rent(folder: Path) -> CloudMachine:
    """A machine whose set-up is done: programs in ~/finetune-env, an empty bucket, a checkout with scripts and config.yaml."""
    machine = CloudMachine(folder)
    machine.bucket.mkdir(parents=True)
    shutil.copytree(ROOT / "on_machine", machine.checkout / "on_machine")
    (machine.checkout / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (machine.checkout / "data").mkdir()
    (machine.checkout / "data" / "build.py").write_text("open('data/was-built', 'w').close()\n", encoding="utf-8")
    programs = machine.home / "finetune-env" / "bin"
    machine.program(programs, "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    machine.program(programs, "finetune", FINETUNE)
    machine.program(programs, "tensorboard", TENSORBOARD)
    machine.program(programs, "jupyter", RECORDER)
    return machine


def begin_run(machine: CloudMachine, status: str, name: str = "run", **values: Any) -> Path:
    """A run in the bucket as an earlier attempt left it."""
    folder = machine.run_folder(name)
    folder.mkdir(parents=True)
    config = load_config(machine.checkout / "config.yaml")
    config.budget.max_run_usd = 25.0
    (folder / "config.yaml").write_text(f"# finetune train config.yaml\n{to_yaml(config)}", encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"status": status, **values}), encoding="utf-8")
    return folder


def lay_out_set(folder: Path, made: str) -> None:
    """A prepared set that differs by `made`."""
    (folder / "databases" / "shop").mkdir(parents=True)
    (folder / "databases" / "shop" / "shop.sqlite").write_text(made, encoding="utf-8")
    (folder / "train.jsonl").write_text(made, encoding="utf-8")
    (folder / "manifest.json").write_text(f'{{"made": "{made}"}}', encoding="utf-8")


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def gone(process: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
