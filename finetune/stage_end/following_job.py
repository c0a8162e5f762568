"""What to type on the own machine after a job on a cloud machine, which has printed it there: `sky logs` shows it last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.budget.attempts import Work
from finetune.budget.ledger import Ledger
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.stage_end.following import needed, rounded_up
from finetune.stage_end.tell import Next, cost_of_account, finetune

if TYPE_CHECKING:
    from finetune.run_folder import RunFolder

SPOT, CHEAPEST = "sky/train_spot.yaml", "sky/train_cheapest.yaml"
MANAGED = "managed"
"""In SkyPilot's id of a managed job's task."""


@dataclass(frozen=True)
class Job:
    """task_id: SkyPilot's. max_run_usd, max_hours: its limits, as typed. max_hours is that of one machine."""

    bucket: str
    task_id: str
    max_run_usd: float
    max_hours: float


def cost_of_run(run: RunFolder) -> str:
    """All that the run has cost, training and score apart; raises UserError if its ledger cannot be read."""
    account = Ledger(run.ledger).account()
    if not account.attempts:
        return "not recorded, because the price of this machine is unknown"
    works: dict[str, Work] = {"training": "train", "score": "evaluate"}
    parts = [(name, account.of(work)) for name, work in works.items()]
    return "; ".join(f"{name} {cost_of_account(part)}" for name, part in parts if part.attempts)


def after_train_job(run: RunFolder, job: Job, code: int, *, scored: bool) -> list[Next]:
    """code: with which the job ends. scored: whether score and report are there."""
    status = run.record().status if run.run_json.is_file() else None
    managed = MANAGED in job.task_id
    if code == EXIT_TRANSIENT and managed:
        return [Next(("sky", "jobs", "queue"), "the managed job goes on by itself")]
    if code == EXIT_TRANSIENT:
        return [_again(run, managed, [], "goes on where it was")]
    if code == EXIT_OK and status != "done":
        return [
            _again(run, managed, _raised(run, job), "the rest, estimated by the pace so far"),
            *_if(scored, run, job),
        ]
    if scored:
        return after_scored(run, job)
    return [evaluate(run)] if status == "done" else []


def after_scored(run: RunFolder, job: Job) -> list[Next]:
    return [
        Next(("gcloud", "storage", "cp", f"gs://{job.bucket}/runs/{run.path.name}/report.html", "."), "the report"),
        serve_again(run.path.name),
    ]


def evaluate(run: RunFolder, *variables: str) -> Next:
    words = [word for variable in (f"RUN_NAME={run.path.name}", *variables) for word in ("--env", variable)]
    return finetune("launch", "sky/evaluate.yaml", *words, why="its score and report")


def serve_again(run_name: str, export: str = "") -> Next:
    """export: the folder of the bucket that is served in place of the run."""
    what = f"EXPORT={export}" if export else f"RUN_NAME={run_name}"
    return finetune("launch", "sky/serve.yaml", "--env", what, why="an endpoint, through ssh")


def _if(scored: bool, run: RunFolder, job: Job) -> list[Next]:
    if scored:
        return after_scored(run, job)[:1]
    return [evaluate(run)] if run.adapter.is_dir() else []


def _again(run: RunFolder, managed: bool, variables: Sequence[str], why: str) -> Next:
    words = [word for name in (f"RUN_NAME={run.path.name}", *variables) for word in ("--env", name)]
    return finetune("launch", *["--jobs"] * managed, SPOT if managed else CHEAPEST, *words, why=why)


def _raised(run: RunFolder, job: Job) -> list[str]:
    """The limits that were too low; both twice as high where the pace so far does not tell which."""
    try:
        whole, spent = needed(run), Ledger(run.ledger).account()
    except UserError:
        return []
    found = []
    if whole.usd is not None and whole.usd > job.max_run_usd:
        found.append(f"MAX_RUN_USD={rounded_up(whole.usd):g}")
    if whole.hours is not None and whole.hours - spent.hours > job.max_hours:
        found.append(f"MAX_HOURS={rounded_up(whole.hours - spent.hours):g}")
    return found or [f"MAX_RUN_USD={2 * job.max_run_usd:g}", f"MAX_HOURS={2 * job.max_hours:g}"]
