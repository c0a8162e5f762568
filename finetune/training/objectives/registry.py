"""The training objectives by the name used in `training.objective`."""

from __future__ import annotations

from finetune.errors import UserError
from finetune.training.objectives.objective import Objective
from finetune.training.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {"sft": SFT}


def objective_named(name: str) -> Objective:
    """Raises UserError for a name that is not registered."""
    if name not in OBJECTIVES:
        raise UserError(
            f"training.objective: {name!r} is not one of {', '.join(sorted(OBJECTIVES))}",
            code="training.unknown_objective",
        )
    return OBJECTIVES[name]
