"""The score and the report of a run, for the runs of MLflow, Trackio and W&B that its training has logged to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from finetune.config.load import load_config
from finetune.errors import UserError
from finetune.run_folder import RunFolder
from finetune.runtime.files import load_json
from finetune.runtime.installed import install_command
from finetune.training.tracking import wandb_run
from finetune.training.tracking.mlflow_run import RUN_ID_FILE
from finetune.training.tracking.names import EXTRAS, LABELS, OUTSIDE, check_trackers, chosen, wandb_mode
from finetune.training.tracking.process import TrackerProcess, opening
from finetune.training.tracking.trackio_run import NAME_FILE

WAIT_SECONDS = 15.0
LOGGED = {"mlflow": RUN_ID_FILE, "trackio": NAME_FILE, "wandb": wandb_run.RUN_ID_FILE}
"""The file that a tracker's run has left in the run's folder."""


def send_results(run: RunFolder, say: Callable[[str], None]) -> None:
    """Adds the scores of eval.json, and for MLflow report.html as an artifact, where training has logged the run. Not to a
    W&B run that is offline: `wandb sync` uploads one folder, that of training. Never raises: at worst it says in one line that
    they are not there, after WAIT_SECONDS."""
    try:
        tracking = load_config(run.config_yaml).tracking
        wanted = {*chosen(tracking)} & {*OUTSIDE} | ({"wandb"} if wandb_mode(tracking) == "online" else set())
        kinds = [kind for kind, file in LOGGED.items() if kind in wanted and (run.path / file).is_file()]
        messages = _messages(run) if kinds else []
        if not messages:
            return
        if missing := [kind for kind in kinds if find_spec(kind) is None]:
            raise UserError(
                f"{LABELS[missing[0]]} is not installed here (`{install_command(EXTRAS[missing[0]])}`)",
                code="tracking.not_installed",
            )
        check_trackers(tracking)
    except (OSError, ValueError, UserError) as error:
        say(f"{error}; the score is not logged there")
        return
    started = [_started(kind, say) for kind in kinds]
    for kind, process in zip(kinds, started, strict=True):
        if process is not None:
            process.send(opening(kind, tracking, run.path, run.path.name, writes=False))
            for message in messages:
                process.send(message)
    for kind, process in zip(kinds, started, strict=True):
        if process is not None and not process.close(WAIT_SECONDS):
            say(f"{LABELS[kind]}: the score is still being sent, for a minute at most")


def _started(kind: str, say: Callable[[str], None]) -> TrackerProcess | None:
    try:
        return TrackerProcess(kind, say)
    except OSError as error:
        say(f"{LABELS[kind]}: {error.strerror or error}; the score is not logged there")
        return None


def _messages(run: RunFolder) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, AttributeError):
        models = load_json(run.eval_json).get("models", {})
        scores = {
            f"score/{name}": models[name].get("execution_accuracy") for name in ("base", "tuned") if name in models
        }
        kept = {name: score for name, score in scores.items() if isinstance(score, int | float)}
        if kept:
            steps = run.record().steps
            messages.append({"results": kept, "step": steps.done if steps else 0})
    report = run.path / "report.html"
    if report.is_file():
        messages.append({"artifact": str(report.resolve())})
    return messages
