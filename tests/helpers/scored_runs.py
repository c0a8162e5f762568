"""Folders of runs with verdicts to compare, of any number of questions and databases."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from finetune.budget.ledger import Ledger
from finetune.machine.price import MachinePrice
from tests.helpers.report_fixtures import build_run, change, rows, write_evaluation

REST = {"double_quoted_text": False, "prompt_sha256": "", "gold_sha256": "", "gold_kind": "sound", "new_tokens": 5}
JUDGING = {"rule": "test_suite", "timeout_seconds": 10.0}


def scored_run(
    root: Path,
    name: str,
    *,
    right: float,
    questions: int = 60,
    databases: int = 6,
    seed: int = 0,
    usd: float | None = 1.0,
    judging: dict[str, Any] = JUDGING,
    **record: Any,
) -> Path:
    """right: the share of right answers, drawn with the seed. usd: what its ledger has cost; None for no ledger."""
    run = build_run(root / name, questions=questions, run_name=name, **record)
    draws = random.Random(f"{seed} {right}")
    base, tuned = rows(questions)
    for number, row in enumerate(tuned):
        verdict = "correct" if draws.random() < right else "wrong_rows"
        row |= {"verdict": verdict, "error": None, "prediction": row["gold"]}
        for one in (row, base[number]):
            one |= REST | {"db_id": f"database {number % databases:03d}", "verdicts": {"test_suite": one["verdict"]}}
    write_evaluation(run, base=base, tuned=tuned, judging=judging)
    if usd is not None:
        price = MachinePrice(usd, "catalog")
        log = Ledger(run / "ledger", "train").new_attempt(1, machine={}, price=price, resumed_step=None)
        log.begin(0.0)
        log.end(3600.0, "done", 10)
    return run


def many_runs(root: Path, number: int, *, questions: int = 60) -> Path:
    for place in range(number):
        run = scored_run(
            root,
            f"run-{place:03d}",
            right=0.2 + 0.6 * place / max(1, number - 1),
            seed=place,
            questions=questions,
            usd=0.5 + place % 7,
            started_at=f"2026-11-{1 + place % 28:02d}T10:00:00+00:00",
            model={"name": ("one/model", "another/model")[place % 2]},
        )
        change(run / "eval.json", cost={"usd_per_point": 0.01 + place % 11})
    return root
