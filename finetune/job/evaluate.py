"""`finetune job evaluate`: scores a run in the bucket and writes its report there."""

from __future__ import annotations

from contextlib import suppress

from finetune.budget.ledger import Ledger
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.job.limits import hours_left
from finetune.job.metering import Metering
from finetune.job.programs import say
from finetune.job.score import score
from finetune.job.settings import JobSettings
from finetune.job.too_dear import refused_as_too_dear
from finetune.machine.price import Ceilings
from finetune.run_folder import RunFolder
from finetune.runtime.commands import env_option
from finetune.stage_end.following_job import after_scored, cost_of_run
from finetune.stage_end.following_job import evaluate as evaluate_again
from finetune.stage_end.tell import tell


def evaluate(settings: JobSettings) -> int:
    """Exit codes: those of `finetune evaluate` (75: interrupted, and the next launch goes on from its answers); 2 if the
    limit was too low."""
    settings.require_bucket()
    run = run_to_score(settings)
    if (code := refused_as_too_dear(run, settings)) is not None:
        return code
    hours = hours_left(settings)  # MAX_RUN_USD is for this evaluation alone: the meter records it, and has no ceiling
    metering = Metering(Ledger(run.ledger, "evaluate"), Ceilings())
    ended = score(run, hours, settings, metering)
    following = after_scored(run, settings.job) if ended and ended.code == 0 else [evaluate_again(run)]
    with suppress(UserError):  # the exit code is that of the work
        tell("run", cost_of_run(run), following if ended else [], say, within=True)
    if ended is None:
        raise UserError(f"{run.path}: there is no question whose SQL can be executed", code="data.no_database")
    if ended.out_of_time and ended.code != EXIT_OK:
        raise UserError(
            f"not scored in {hours:.4f} hours ({settings.limits}); the answers so far are in the bucket: launch again with "
            f"{env_option('RUN_NAME', run.path.name)}, which goes on from them, and a higher limit if one launch should do",
            code="job.out_of_time",
        )
    return EXIT_TRANSIENT if metering.too_dear else ended.code


def run_to_score(settings: JobSettings) -> RunFolder:
    """The run RUN_NAME; if that is empty, this job's own run, else the newest trained one. Raises UserError if there is none."""
    name = settings.name_of_run()
    if not settings.run_name and not (settings.runs / name).is_dir():
        name = _newest_trained(settings)
    run = RunFolder(settings.runs / name)
    if not run.config_yaml.is_file():
        there = sorted(path.name for path in settings.runs.glob("*") if path.is_dir())
        listed = " ".join(f"{other}/" for other in there) or "nothing"
        raise UserError(f"{run.path}: no such run; found: {listed}", code="run.not_found")
    return run


def _newest_trained(settings: JobSettings) -> str:
    trained = settings.runs.glob("*/adapter/adapter_config.json")
    newest = max(trained, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"{settings.runs}: no trained run found; train one first, or name one with --env RUN_NAME=NAME",
            code="run.none_trained",
        )
    return newest.parents[1].name
