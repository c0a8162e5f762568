"""The end of a machine's set-up: the first optimizer step, after which its seconds go into the ledger."""

from __future__ import annotations

from finetune.machine import set_up
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.training.session import Session


def end_part(part: str) -> None:
    """Ends a part of the set-up, of which the first process keeps the log."""
    if distributed.is_rank0():
        set_up.mark(part)


def first_step_done(session: Session) -> None:
    end_part(set_up.STEP)
    if distributed.is_rank0() and (taken := set_up.take(session.inputs.config.model.name)):
        session.budget.note(set_up.EVENT, **taken.for_ledger())
        say(f"set-up: {taken.text}")
