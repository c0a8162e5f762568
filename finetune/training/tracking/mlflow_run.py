"""One MLflow run for all attempts of a run, through MLflow's own client."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.runtime.files import write_text

RUN_ID_FILE = "mlflow-run-id"
TAG = "finetune.run_id"
CHANGED = "finetune.changed"
CURVES = ("train/loss", "eval/loss")
"""Every row has one of them."""
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 500
"""What a server takes in one request; 500 characters is the limit of MLflow 2."""
STATES = {"done": "FINISHED", "budget_stop": "FINISHED", "paused": "FINISHED", "interrupted": "KILLED"}
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""worker.py tries again by itself. A variable that the user has set takes precedence."""


class MLflowRun:
    """Steps that MLflow has already keep the values of the attempt that logged them first, as with W&B."""

    def __init__(self, opening: dict[str, Any]) -> None:
        """opening: folder, name, project, run_id (of run.json), config (nested), writes (false: only results are added)."""
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._folder = Path(opening["folder"])
        self._id = self._known_id(opening) or self._create(opening)
        write_text(self._folder / RUN_ID_FILE, f"{self._id}\n")
        self._state: str | None = None
        self._last = -1
        if opening["writes"]:
            self._last = self._last_step()
            self._client.update_run(self._id, status="RUNNING")
            self._log_config(opening["config"])

    def deliver(self, messages: list[dict[str, Any]]) -> None:
        """A message with `step` and `values` is a row. Sending a message twice changes nothing: its time is the same."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(_plain(key), value, int(1000 * message["time"]), message["step"])
            for message in messages
            if "values" in message and message["step"] > self._last
            for key, value in message["values"].items()
        ]
        for part in _parts(metrics, MOST_METRICS):
            self._client.log_batch(self._id, metrics=part)
        for message in messages:
            if "totals" in message:
                tags = [RunTag(_plain(key), str(value)) for key, value in message["totals"].items()]
                self._client.log_batch(self._id, tags=tags)
            elif "results" in message:
                self._log_results(message)
            elif "artifact" in message:
                self._client.log_artifact(self._id, message["artifact"])
            elif "status" in message:
                self._state = STATES.get(message["status"], "FAILED")
                self._client.set_terminated(self._id, self._state)

    def close(self) -> None:
        """An attempt that has ended without saying how was killed."""
        if self._last >= 0 and self._state is None:
            self._client.set_terminated(self._id, "FAILED")

    def _known_id(self, opening: dict[str, Any]) -> str | None:
        """The run of earlier attempts: by the id in the run's folder, else by its tag; None if the server has none."""
        from mlflow.exceptions import MlflowException

        with suppress(OSError, UnicodeDecodeError):
            saved = (self._folder / RUN_ID_FILE).read_text(encoding="utf-8").strip()
            if re.fullmatch(r"[0-9a-zA-Z_-]{1,64}", saved):
                try:
                    if self._client.get_run(saved).info.lifecycle_stage == "active":
                        return saved
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
        experiment = self._client.get_experiment_by_name(opening["project"])
        if experiment is None or not opening["run_id"]:
            return None
        found = self._client.search_runs(
            [experiment.experiment_id], f"tags.`{TAG}` = '{opening['run_id']}'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def _create(self, opening: dict[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(opening["project"])
        number = experiment.experiment_id if experiment else self._client.create_experiment(opening["project"])
        tags = {TAG: opening["run_id"] or ""}
        return str(self._client.create_run(number, run_name=opening["name"], tags=tags).info.run_id)

    def _last_step(self) -> int:
        histories = [self._client.get_metric_history(self._id, curve) for curve in CURVES]
        return max((metric.step for metric in chain(*histories)), default=0)

    def _log_config(self, config: dict[str, Any]) -> None:
        """MLflow never changes a parameter: what a resume has changed becomes a tag."""
        from mlflow.entities import Param

        logged = self._client.get_run(self._id).data.params
        values = {key: _short(value) for key, value in flat(config)}
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        for part in _parts(new, MOST_PARAMS):
            self._client.log_batch(self._id, params=part)
        changed = [
            f"{key}: {logged[key]} -> {value}" for key, value in values.items() if logged.get(key, value) != value
        ]
        if changed:
            self._client.set_tag(self._id, CHANGED, "; ".join(changed)[:LONGEST_PARAM])

    def _log_results(self, message: dict[str, Any]) -> None:
        """Once: MLflow would keep each value of a report that is written again."""
        logged = self._client.get_run(self._id).data.metrics
        for key, value in message["results"].items():
            if logged.get(key) != value:
                self._client.log_metric(self._id, key, value, timestamp=int(1000 * time.time()), step=message["step"])


def flat(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """`lora.r` and its value, for every value that is no section."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 3]}..."


def _plain(key: str) -> str:
    return re.sub(r"[^0-9A-Za-z_\-. :/]", "_", key)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
