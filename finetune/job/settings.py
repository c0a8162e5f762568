"""A job's environment as one typed object. The task YAMLs of sky/ set RUN_NAME, CONFIG, OVERRIDES, EVALUATE, MAX_RUN_USD,
MAX_HOURS, VLLM_MINUTES and BUCKET; SkyPilot sets SKYPILOT_*. What sky/serve.yaml alone sets is read in serve.py."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from finetune.errors import UserError
from finetune.machine import four_bit_place
from finetune.machine.price import LARGEST_LIMIT, parse_limit
from finetune.run_name import LONGEST_NAME, fault_of_name
from finetune.runtime.files import parse_json
from finetune.runtime.overrides import split_overrides
from finetune.runtime.paths import expanded
from finetune.stage_end.following_job import Job
from finetune.stage_end.tell import WITHIN

API_KEY = "FINETUNE_API_KEY"
SECRETS = (
    *("WANDB_API_KEY", "HF_TOKEN", API_KEY),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"),
)
DEFAULTS = {
    "MAX_RUN_USD": "25",
    "MAX_HOURS": "24",
    "GRACE_SECONDS": "180",
    "FINETUNE_MOUNT": "/bucket",
    "EVALUATE": "0",
    "VLLM_MINUTES": "15",
}


@dataclass(frozen=True)
class Nodes:
    """For a task with num_nodes: the number of nodes, the rank of this one, the address of the first."""

    count: int
    rank: int
    first: str


@dataclass(frozen=True)
class JobSettings:
    """max_run_usd, max_hours and grace_seconds are Decimal so that messages show them as typed. grace_seconds: from SIGTERM until
    a program that does not end is killed. evaluate: whether training ends with the score. vllm_minutes: for how long vLLM's
    environment is waited for; 0: not at all. environment: for the programs that the job starts."""

    mount: Path
    state: Path
    run_name: str
    task_id: str
    config: str
    overrides: list[str]
    max_run_usd: Decimal
    max_hours: Decimal
    grace_seconds: Decimal
    evaluate: bool
    vllm_minutes: Decimal
    bucket: str
    cluster: str
    nodes: Nodes | None
    environment: dict[str, str]

    @property
    def runs(self) -> Path:
        return self.mount / "runs"

    @property
    def limits(self) -> str:
        return f"MAX_HOURS={self.max_hours}, MAX_RUN_USD={self.max_run_usd}"

    @property
    def job(self) -> Job:
        return Job(self.bucket, self.task_id, float(self.max_run_usd), float(self.max_hours))

    def name_of_run(self) -> str:
        """RUN_NAME, or SkyPilot's id of the task, which stays the same when a managed job is recovered on another machine.

        Only characters that are valid in a folder, a bucket and W&B's run ids (none of /\\#?%:).
        """
        if self.run_name:
            return self.run_name
        if not self.task_id:
            raise UserError(
                "RUN_NAME: empty, and no SKYPILOT_TASK_ID to name the run after", code="job.missing_setting"
            )
        name = re.sub(r"[^A-Za-z0-9_-]", "-", self.task_id)[:LONGEST_NAME].lstrip("-")
        if fault := fault_of_name(name):
            raise UserError(f"SKYPILOT_TASK_ID: cannot name the run: {fault}; set RUN_NAME", code="job.bad_setting")
        return name

    def require_config(self) -> None:
        """Raises UserError if no config is named, which a run that is to begin needs."""
        if not self.config:
            raise UserError(
                "CONFIG: expected a config file such as configs/mistral_7b_qlora.yaml", code="job.missing_setting"
            )

    def require_bucket(self) -> None:
        """Raises UserError if no writable bucket is mounted."""
        if not (self.mount.is_dir() and os.access(self.mount, os.W_OK)):
            raise UserError(
                f"{self.mount}: no bucket is mounted there; launch with a task of sky/", code="bucket.not_mounted"
            )


def read_settings(given: Mapping[str, str]) -> JobSettings:
    """The settings from an environment. Raises UserError that names every invalid variable."""
    values = {name: given.get(name) or default for name, default in DEFAULTS.items()}
    problems: list[str] = []
    numbers = {name: positive(name, values[name], problems) for name in ("MAX_RUN_USD", "MAX_HOURS", "GRACE_SECONDS")}
    minutes = (
        Decimal(0) if values["VLLM_MINUTES"] == "0" else positive("VLLM_MINUTES", values["VLLM_MINUTES"], problems)
    )
    name = given.get("RUN_NAME", "")
    if name and not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name):
        problems.append(
            f"RUN_NAME: expected at most {LONGEST_NAME} of A-Z a-z 0-9 . _ - with a letter or digit first, found {name[:99]!r}"
        )
    elif name and (fault := fault_of_name(name)):
        problems.append(f"RUN_NAME: {fault}")
    evaluate = switch("EVALUATE", values["EVALUATE"], problems)
    nodes = _nodes(given, problems)
    if problems:
        raise UserError("; ".join(problems), code="job.bad_setting")
    state = Path(given.get("HOME") or Path.home()) / ".finetune"
    environment = {key: value for key, value in given.items() if value or key not in SECRETS}
    return JobSettings(
        mount=Path(expanded(values["FINETUNE_MOUNT"])),
        state=state,
        run_name=name,
        task_id=given.get("SKYPILOT_TASK_ID", ""),
        config=expanded(given.get("CONFIG", "")),  # here, on the machine, whose home folder is meant
        overrides=split_overrides(given.get("OVERRIDES", "")),
        max_run_usd=numbers["MAX_RUN_USD"],
        max_hours=numbers["MAX_HOURS"],
        grace_seconds=numbers["GRACE_SECONDS"],
        evaluate=evaluate,
        vllm_minutes=minutes,
        bucket=given.get("BUCKET") or "BUCKET",
        cluster=_cluster(given),
        nodes=nodes,
        environment=environment
        | {
            "GRACE_SECONDS": values["GRACE_SECONDS"],
            WITHIN: "1",
            four_bit_place.VARIABLE: str(four_bit_place.place_in(state)),
        },
    )


def positive(name: str, text: str, problems: list[str]) -> Decimal:
    """A number above 0, parsed as in the launch policy. One line is added to `problems` for anything else."""
    number = parse_limit(text)
    if number is None:
        problems.append(f"{name}: expected a number above 0 and up to {LARGEST_LIMIT:,}, found {text[:40]!r}")
    return number or Decimal(1)


def switch(name: str, text: str, problems: list[str]) -> bool:
    """Whether a variable that is 1 or 0 is 1. One line is added to `problems` for anything else."""
    if text not in ("0", "1"):
        problems.append(f"{name}: expected 1 or 0, found {text[:40]!r}")
    return text == "1"


def _nodes(given: Mapping[str, str], problems: list[str]) -> Nodes | None:
    found = {name: given.get(f"SKYPILOT_{name}", "") for name in ("NUM_NODES", "NODE_RANK", "NODE_IPS")}
    if not found["NUM_NODES"]:
        return None
    for name in ("NUM_NODES", "NODE_RANK"):
        if not re.fullmatch(r"[0-9]+", found[name] or "0", re.ASCII):
            problems.append(f"SKYPILOT_{name}: expected a whole number, found {found[name]!r}")
            return None
    count = int(found["NUM_NODES"])
    if count <= 1:
        return None
    first = (found["NODE_IPS"].split() or [""])[0]
    if not first:
        problems.append(f"SKYPILOT_NODE_IPS: expected the addresses of {count} nodes, found none")
    return Nodes(count, int(found["NODE_RANK"] or 0), first)


def _cluster(given: Mapping[str, str]) -> str:
    """The cluster's name, for commands in messages; SkyPilot's variable holds more than the name."""
    try:
        name = parse_json(given.get("SKYPILOT_CLUSTER_INFO") or "{}").get("cluster_name")
    except (ValueError, AttributeError):
        name = None
    return str(name or "CLUSTER")
