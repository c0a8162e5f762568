"""Whether a job may use its machine at today's price, decided before anything is computed there.

<bucket>/too-dear/<run>/attempt-NNN.jsonl     starts on machines that were too dear before the run had begun, as in a run's ledger
"""

from __future__ import annotations

from finetune.budget.attempts import Account, Attempt
from finetune.budget.ledger import Ledger
from finetune.budget.newest_prices import look
from finetune.budget.price_watch import TOO_DEAR
from finetune.errors import EXIT_TRANSIENT, EXIT_USER_ERROR, UserError
from finetune.job.programs import say
from finetune.job.settings import JobSettings
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import TooDear, facts, machine_price, too_dear
from finetune.run_folder import RunFolder
from finetune.runtime.commands import env_option

MOST_IN_A_ROW = 3
"""Starts on machines that are too dear, one after the other, after which the job ends for good: each costs boot and set-up."""


def refused_as_too_dear(run: RunFolder, settings: JobSettings) -> int | None:
    """Looks at the newest prices. None if this machine may be used; else books its start and returns the job's exit code: 75, so
    that a managed job tries its next machine, or 2 if no other one would be cheaper."""
    look(say)
    found = now_too_dear()
    if found is None:
        return None
    before, ledger = Ledger(settings.mount / "too-dear" / run.path.name), Ledger(run.ledger)
    machine = facts()
    earlier = [*_last(before.account()), *_last(ledger.account())]
    if not settings.nodes or settings.nodes.rank == 0:
        _book(ledger if run.run_json.exists() else before, machine)
    say(f"this machine is {found.reason}")
    return exit_code(found, run, [*earlier, Attempt(0, "", machine=machine, reason=TOO_DEAR)])


def now_too_dear() -> TooDear | None:
    """Like `machine.price.too_dear`; a price table that cannot be read is reported elsewhere."""
    try:
        return too_dear()
    except UserError:
        return None


def after_training(code: int, run: RunFolder) -> int:
    """The exit code of a job whose training has ended with `code`: 2 instead of 75 if it has stopped because of its price, and no
    other machine of the launch is below the ceiling either."""
    found = now_too_dear()
    if code != EXIT_TRANSIENT or found is None:
        return code
    return exit_code(found, run, _last(Ledger(run.ledger).account()))


def exit_code(found: TooDear, run: RunFolder, in_a_row: list[Attempt]) -> int:
    """in_a_row: the last attempts, all of which were on a machine that was too dear; the last one is this."""
    again = (
        f"launch again with {env_option('RUN_NAME', run.path.name)}, which goes by today's prices, and a higher max_hourly_cost "
        "if one is needed"
    )
    if found.everywhere:
        say(f"every other machine of the launch is above its ceiling by now, too: stopped; {again}")
        return EXIT_USER_ERROR
    places = [(one.zone, one.gpu, one.spot) for one in in_a_row]
    if len(places) > len(set(places)) or len(places) >= MOST_IN_A_ROW:
        say(
            f"{len(places)} starts in a row were on such machines: what places this job does not look at today's prices, so it "
            f'is stopped; {again}. docs/concepts/prices.md, "Prices move", says how the controller is made to look'
        )
        return EXIT_USER_ERROR
    say("stopped; a managed job goes on with its next machine")
    return EXIT_TRANSIENT


def _last(account: Account) -> list[Attempt]:
    """The attempts at the end of an account that have ended as too dear, oldest first."""
    ordered = sorted(account.attempts, key=lambda one: one.began_at or "")
    count = next((n for n, one in enumerate(reversed(ordered)) if one.reason != TOO_DEAR), len(ordered))
    return ordered[len(ordered) - count :]


def _book(ledger: Ledger, machine: dict[str, str | bool | int | None]) -> None:
    """Records the start of this machine: it has cost money."""
    time = MachineTime(provisioned=True)
    try:
        log = ledger.new_attempt(ledger.next_attempt(), machine=machine, price=machine_price(), resumed_step=None)
        log.begin(time.take())
        log.end(time.take(), TOO_DEAR, None)
        time.mark()
    except UserError as error:
        say(f"the cost of this start is not recorded: {error}")
