"""Kill training runs repeatedly, and check that they end like an uninterrupted run.

python -m chaos --kills 50
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from chaos.attempt import Machine
from chaos.environment import KINDS, Kind, make_environment
from chaos.full_disk import on_a_full_disk, small_disk
from chaos.outcome import Outcome, figures, table, verdict, violations
from chaos.plan import Plan
from chaos.provisioned import on_a_provisioned_machine
from chaos.soak import Harness, Run, killed_repeatedly, uninterrupted
from finetune.runtime.console import escape_unprintable


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if everything held, 1 if not, 2 for a wrong argument."""
    escape_unprintable()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the attempt in progress ends with us
    parsed = _parser().parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if parsed.seed is None else parsed.seed
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"chaos: {parsed.kills} kills, seed {seed} (--seed {seed} repeats them), in {folder}", flush=True)
    try:
        outcome = run_session(
            folder, parsed.kills, seed, [kind for kind in KINDS if kind.name in parsed.kinds], parsed.extras
        )
    except KeyboardInterrupt:
        print(f"chaos: interrupted; runs and logs so far are kept in {folder}", file=sys.stderr)
        return 1
    print("\n".join(["", *table(outcome), "", *figures(outcome)]))
    found = violations(outcome)
    print("\n".join([*(f"VIOLATION {line}" for line in found), "", verdict(outcome, found)]))
    if found:
        print(f"runs and logs are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if found else 0


def run_session(folder: Path, kills: int, seed: int, kinds: Sequence[Kind], extras: bool) -> Outcome:
    began = time.monotonic()
    environment = make_environment(folder / "environment")
    harness = Harness(environment, Machine(folder / "machine"), folder / "runs", _say)
    whole = {kind.name: uninterrupted(harness, kind) for kind in kinds}
    plan = Plan(kills, seed, len(kinds))
    killed: list[Run] = []
    most = 2 * len(kinds) + kills  # a run may end before its kill comes
    while plan.left and len(killed) < most and not any(run.fault for run in [*whole.values(), *killed]):
        kind = kinds[len(killed) % len(kinds)]
        killed.append(killed_repeatedly(harness, kind, f"{kind.name}-{len(killed) + 1:02d}", plan))
    extras = extras and not plan.left
    filled = _full_disk(harness, kinds[0], folder / "small-disk") if extras else None
    name = f"{kinds[0].name}-provisioned"
    provisioned = on_a_provisioned_machine(harness, kinds[0], folder / "provisioned", name) if extras else None
    return Outcome(whole, killed, filled, provisioned, kills, plan.not_reached(), time.monotonic() - began)


def _full_disk(harness: Harness, kind: Kind, folder: Path) -> Run | None:
    with small_disk(folder) as disk:
        if disk is None:
            _say("full disk: skipped, because only root may mount a small disk")
            return None
        return on_a_full_disk(harness, kind, disk, f"{kind.name}-full-disk")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Kill training runs repeatedly, and compare how they end."
    )
    parser.add_argument("--kills", type=_positive, default=50, metavar="N", help="number of SIGKILLs (50)")
    parser.add_argument("--seed", type=int, metavar="N", help="repeats the kills and damage of an earlier session")
    names = [kind.name for kind in KINDS]
    parser.add_argument(
        "--kinds", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names) + " (all)"
    )
    parser.add_argument(
        "--no-extras",
        dest="extras",
        action="store_false",
        help="skip the run on a full disk and the one on a provisioned machine",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
