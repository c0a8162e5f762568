"""The score of a run and its report, in the job that trained it or in one of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.budget.ledger import Ledger
from finetune.budget.price_watch import TOO_DEAR
from finetune.config.schema import RunConfig
from finetune.errors import EXIT_OK, EXIT_TRANSIENT
from finetune.job.data import data_of_run
from finetune.job.kept import wait_for_model
from finetune.job.limits import Ended, run_limited
from finetune.job.metering import Metering
from finetune.job.programs import call, say
from finetune.job.settings import JobSettings
from finetune.job.too_dear import after_training
from finetune.job.vllm import wait_for_vllm
from finetune.machine.price import Ceilings
from finetune.prepared_folder import DATABASES, MANIFEST
from finetune.run_folder import RunFolder
from finetune.runtime.files import load_json

LEAST_SECONDS = 120.0
"""About what loading a 7B model takes: with less left of a ceiling, no answer would come of it."""


def score_after_training(run: RunFolder, hours: float, settings: JobSettings) -> int:
    """Score a run with what training has left of its ceilings. hours: left to this machine. Returns the exit code: 0 also if too
    little is left, because the run is whole without its score; 75 if it was interrupted and goes on from the answers so far."""
    if not settings.evaluate:
        say(f"{run.path} is done")
        return EXIT_OK
    if settings.nodes:
        say(f"{run.path} is done; not scored here, where the other machines of the task would wait")
        return EXIT_OK
    if not (run.adapter / "adapter_config.json").is_file():
        say(f"{run.path}: not scored, because there is no adapter yet")
        return EXIT_OK
    if is_scored(run):
        say(f"{run.path} is done and scored")
        return EXIT_OK
    ceilings = Ceilings(run_usd=float(settings.max_run_usd), hours=run.config().budget.max_hours)
    metering = Metering(Ledger(run.ledger, "evaluate"), ceilings)
    left = min(metering.seconds_left(), 3600 * hours)
    if left < LEAST_SECONDS:
        why = "; ".join(filter(None, (settings.limits, metering.spent())))
        say(f"{run.path}: not scored, too little is left for it ({why}); the run is kept")
        return EXIT_OK
    with interruption_is_transient():
        return _scored(run, hours, settings, metering)


def _scored(run: RunFolder, hours: float, settings: JobSettings, metering: Metering) -> int:
    ended = score(run, hours, settings, metering)
    if ended is None or ended.code == EXIT_OK:
        return EXIT_OK
    if metering.too_dear:
        say(f"{run.path}: this machine is {ended.over}; the run and the answers so far are kept")
        return after_training(EXIT_TRANSIENT, run)
    if over := ended.over or (f"MAX_HOURS={settings.max_hours}" if ended.out_of_time else ""):
        say(f"{run.path}: not scored to the end ({over}); the run and the answers so far are kept")
        return EXIT_OK  # so that a managed job does not restart it
    if ended.interrupted or ended.code == EXIT_TRANSIENT:
        return EXIT_TRANSIENT
    say(f"{run.path}: trained, but its score failed with exit code {ended.code}")
    return ended.code


def score(run: RunFolder, hours: float, settings: JobSettings, metering: Metering) -> Ended | None:
    """Run `finetune evaluate`, and `finetune report` if it succeeds, on the meter. None if there is no question to ask."""
    began = time.monotonic()

    def left() -> float:
        return max(0.0, hours - (time.monotonic() - began) / 3600)

    with metering.recorded():
        data_of_run(run, settings)
        config = run.config()
        if why := _nothing_to_score(config):
            say(f"{run.path}: not scored, because {why}")
            metering.ends("nothing to score")
            return None
        wait_for_model(config.model, settings, whole=True)
        if config.evaluation.generator != "hf":
            wait_for_vllm(settings, 3600 * left())
        say(f"scoring {run.path} for at most {left():.4f} hours")
        ended = run_limited(["finetune", "evaluate", str(run.path)], left(), settings, limit=metering)
        if ended.code == EXIT_OK:
            call(["finetune", "report", str(run.path)], settings.environment)
        metering.ends(TOO_DEAR if metering.too_dear else _reason(ended))
    return ended


def _nothing_to_score(config: RunConfig) -> str:
    """Why the prepared data have no question; "" if they may have some."""
    folder, split = Path(config.data.output_dir), config.evaluation.split
    if not any((folder / DATABASES).glob("*")):
        return "its data come without databases"
    try:
        empty = load_json(folder / MANIFEST)["counts"][split] == 0
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # `finetune evaluate` says what is wrong with it
    return f"its data have no questions in the split {split}" if empty else ""


def _reason(ended: Ended) -> str:
    if ended.code == EXIT_OK:
        return "scored"
    if ended.over or ended.out_of_time:
        return "budget_stop"
    return "interrupted" if ended.interrupted or ended.code == EXIT_TRANSIENT else "failed"


def is_scored(run: RunFolder) -> bool:
    """Whether there are a score and a report that were written after the adapter, by the bucket's clock. If it is wrong, the kept
    answers are judged once more."""
    try:
        trained = (run.adapter / "adapter_config.json").stat().st_mtime
        return all((run.path / name).stat().st_mtime >= trained for name in (run.eval_json.name, "summary.json"))
    except FileNotFoundError:
        return False


@contextmanager
def interruption_is_transient() -> Iterator[None]:
    """SIGTERM between two programs ends the job with 75, too, so that a managed job scores on its next machine."""
    try:
        yield
    except SystemExit as stopped:
        raise SystemExit(EXIT_TRANSIENT) from stopped
