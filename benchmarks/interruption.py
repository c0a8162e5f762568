"""Measures the cost of an interruption: stall per save, time from the notice to the committed checkpoint, and change of the loss.

    python -m benchmarks.random_model mistral-7b /tmp/mistral --corpus data/built/train.jsonl
    python -m benchmarks.interruption configs/mistral_7b_quick.yaml --out /tmp/interruption model.name=/tmp/mistral ...

Runs `finetune train` three times with the same config: twice uninterrupted, whose difference is the noise between two runs, and
once with a SIGTERM in the middle, as on a preemption, and a resume. Prints a JSON object; everything in it is measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

USUAL_MINUTES = 10.0
"""Time between two saves in the default config, which stall_share_at_10_minutes refers to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every run")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-steps", type=int, default=15)
    parser.add_argument("--stop-after", type=int, default=25, help="the SIGTERM comes once this step is logged")
    arguments = parser.parse_args()
    first, second = (trained(arguments, name) for name in ("whole-1", "whole-2"))
    code, stopped = interrupted(arguments, "interrupted")
    resumed = command(["train", "--resume", str(arguments.out / "interrupted")], arguments.out / "resumed.txt")
    third = record(arguments, "interrupted")
    at = stopped["steps"]["done"]
    saves = first["saves"]
    stall = saves["stall_seconds"] / saves["count"]
    result = {
        "gpu": first["hardware"].get("gpu"),
        "stall_seconds_per_save": round(stall, 3),
        "stall_share_at_10_minutes": round(stall / (60 * USUAL_MINUTES), 6),
        "bytes": saves["bytes"],
        "commit_seconds": saves["commit_seconds"],
        "exit_codes": [code, resumed],
        "stopped_at_step": at,
        "notice_to_commit_seconds": stopped.get("stop", {}).get("seconds"),
        "largest_loss_difference": {
            "two_uninterrupted_runs": difference(first, second, 0),
            "before_the_interruption": difference(first, third, 0, at),
            "after_the_interruption": difference(first, third, at),
            "two_uninterrupted_runs_after_that_step": difference(first, second, at),
        },
        "tokens_per_second": [round(each["tokens_per_second"]) for each in (first, second)],
    }
    print(json.dumps(result, indent=2))


def trained(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    code = command(training(arguments, name), arguments.out / f"{name}.txt")
    if code:
        sys.exit(f"{name}: finetune train ended with {code}; see {arguments.out / name}.txt")
    return record(arguments, name)


def interrupted(arguments: argparse.Namespace, name: str) -> tuple[int, dict[str, Any]]:
    with (arguments.out / f"{name}.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *training(arguments, name)], stdout=log, stderr=subprocess.STDOUT
        )
        while process.poll() is None and steps_done(arguments.out / name) < arguments.stop_after:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    return code, record(arguments, name)


def training(arguments: argparse.Namespace, name: str) -> list[str]:
    own = {
        "training.output_dir": arguments.out,
        "training.run_name": name,
        "training.max_steps": arguments.steps,
        "training.logging_steps": 1,
        "training.eval_steps": 0,
        "checkpoint.save_steps": arguments.save_steps,
    }
    return ["train", str(arguments.config), *arguments.overrides, *(f"{key}={value}" for key, value in own.items())]


def command(words: list[str], log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-m", "finetune", *words], stdout=file, stderr=subprocess.STDOUT)
    return done.returncode


def record(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((arguments.out / name / "run.json").read_text(encoding="utf-8"))
    return value


def steps_done(run: Path) -> int:
    try:
        return int(json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"]["done"])
    except (OSError, ValueError, KeyError):
        return 0


def losses(run: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run["history"] if row.get("loss") is not None}


def difference(one: dict[str, Any], other: dict[str, Any], after: int, until: int | None = None) -> float:
    """Largest difference between the two runs' losses of the same step, over the steps after `after` and up to `until`."""
    first, second = losses(one), losses(other)
    steps = [step for step in first.keys() & second.keys() if step > after and (until is None or step <= until)]
    return round(max((abs(first[step] - second[step]) for step in steps), default=0.0), 6)


if __name__ == "__main__":
    main()
