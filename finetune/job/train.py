"""`finetune job train`: starts a run in the bucket, or resumes an interrupted one from its newest checkpoint, and scores it.

With EVALUATE=1 the job goes on with the score and the report when training is done, or stopped at a limit of its own, on the same
machine and under the same ceilings. If it is interrupted while it scores, the next one goes on there and does not train again.

For a task with num_nodes, SkyPilot runs this on every node.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from finetune.budget.lease import clear_not_started
from finetune.config.load import load_config
from finetune.config.schema import ModelSection
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.job.data import data_of_config, data_of_run
from finetune.job.kept import prepare_model, wait_for_model
from finetune.job.limits import hours_left, run_limited
from finetune.job.programs import say, tensorboard
from finetune.job.score import is_scored, score_after_training
from finetune.job.settings import JobSettings
from finetune.job.too_dear import after_training, refused_as_too_dear
from finetune.machine import set_up
from finetune.run_folder import RunFolder
from finetune.runtime.commands import env_option
from finetune.stage_end.following_job import after_train_job, cost_of_run
from finetune.stage_end.tell import tell

NODES_PORT = 29500
LATER_HOURS = 0.2
"""After the first node's limit another one ends by itself: the first one has stopped both long before."""


def train(settings: JobSettings) -> int:
    """Exit codes: 0 done, or stopped at a limit with a checkpoint; 2 user error; 75 interrupted, to be run again; if the score
    failed, its own."""
    settings.require_bucket()
    set_up.begin_job()
    run = RunFolder(settings.runs / settings.name_of_run())
    if settings.nodes and settings.nodes.rank:
        return _helped(run, settings)
    code = _trained(run, settings)
    with suppress(UserError, OSError):  # the exit code is that of the work
        following = after_train_job(run, settings.job, code, scored=is_scored(run))
        tell("run", cost_of_run(run), following, say, within=True)
    return code


def _trained(run: RunFolder, settings: JobSettings) -> int:
    name = run.path.name
    wandb = {"WANDB_RUN_ID": name, "WANDB_NAME": name, "WANDB_RESUME": "allow"}
    settings = replace(settings, environment=settings.environment | wandb)
    run = RunFolder(settings.runs / name)
    if not _has_ended(run, settings) and (code := refused_as_too_dear(run, settings)) is not None:
        return code
    clear_not_started(run, say)
    if not run.run_json.exists():
        words = _begin(run, settings)
    elif run.record().status != "done":
        words = _go_on(run, settings)
    else:
        return score_after_training(run, _hours_for_the_score(run, settings), settings)
    prepare_model(_model(run, settings), settings)
    hours, began = hours_left(settings), time.monotonic()
    with tensorboard(settings):
        say(f"training for at most {hours:.4f} hours on this machine")
        ended = run_limited([*trainer(settings), *words], hours, settings)
        if ended.out_of_time:
            say(f"{hours:.4f} hours are over ({settings.limits}): stopped, the newest checkpoint is kept in {run.path}")
            return EXIT_OK  # so that a managed job does not restart it
        if ended.code != EXIT_OK:
            return after_training(ended.code, run)
        return score_after_training(run, hours - (time.monotonic() - began) / 3600, settings)


def _helped(run: RunFolder, settings: JobSettings) -> int:
    """Train on another node than the first, which decides what is typed, keeps the run's folder, and enforces the limits.

    SkyPilot kills all nodes as soon as one ends with another code than 0. An interruption is reported by the first node, which
    may still be copying the last checkpoint into the bucket.
    """
    assert settings.nodes
    if run.run_json.exists():
        if run.record().status == "done":
            return EXIT_OK  # the first node trains no more
        data_of_run(run, settings)
    else:
        settings.require_config()
        data_of_config(Path(settings.config), settings.overrides, settings)
    wait_for_model(_model(run, settings), settings)
    say(f"node {settings.nodes.rank} of {settings.nodes.count}: trains with the first one, {settings.nodes.first}")
    hours = float(settings.max_hours) + LATER_HOURS
    ended = run_limited([*trainer(settings), settings.config or "CONFIG"], hours, settings)
    return EXIT_OK if ended.code == EXIT_TRANSIENT else ended.code


def _model(run: RunFolder, settings: JobSettings) -> ModelSection:
    config = run.config() if run.run_json.exists() else load_config(Path(settings.config), settings.overrides)
    return config.model


def trainer(settings: JobSettings) -> list[str]:
    """The command for `finetune train`: with torchrun, one process per GPU, if there are several GPUs or nodes."""
    count, nodes = max(gpus(settings), 1), settings.nodes
    if nodes is None and count == 1:
        return ["finetune", "train"]
    where = []
    if nodes:
        where = ["--nnodes", str(nodes.count), "--node-rank", str(nodes.rank)]
        where += ["--master-addr", nodes.first, "--master-port", str(NODES_PORT)]
    launcher = ["--nproc-per-node", str(count), "-m", "finetune", "train"]
    return ["python", "-m", "finetune.runtime.torchrun", *where, *launcher]


def gpus(settings: JobSettings) -> int:
    """Number of GPUs that this job may use."""
    if visible := settings.environment.get("CUDA_VISIBLE_DEVICES"):
        return len([word for word in visible.split(",") if word])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], env=settings.environment, capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return 0
    return len([line for line in listed.splitlines() if line.startswith("GPU ")])


def _has_ended(run: RunFolder, settings: JobSettings) -> bool:
    """Whether nothing is left to do for this run."""
    return run.run_json.exists() and run.record().status == "done" and (not settings.evaluate or is_scored(run))


def _hours_for_the_score(run: RunFolder, settings: JobSettings) -> float:
    """Of a run that is done: 0 if it needs none, or if the limits leave none, which is no mistake then."""
    if not settings.evaluate or is_scored(run):
        return 0.0
    try:
        return hours_left(settings)
    except UserError as error:
        if error.code != "budget.exhausted":
            raise
        return 0.0


def _begin(run: RunFolder, settings: JobSettings) -> list[str]:
    settings.require_config()
    data_of_config(Path(settings.config), settings.overrides, settings)
    name = run.path.name
    say(f"new run {run.path}; if it is interrupted, the same launch with {env_option('RUN_NAME', name)} resumes it")
    place = [f"training.output_dir={settings.runs}", f"training.run_name={name}"]
    return [settings.config, *settings.overrides, *place, f"budget.max_run_usd={settings.max_run_usd}"]


def _go_on(run: RunFolder, settings: JobSettings) -> list[str]:
    data_of_run(run, settings)
    say(f"resuming {run.path}")
    return ["--resume", str(run.path), "--max-run-usd", str(settings.max_run_usd)]  # the ceiling typed last applies
