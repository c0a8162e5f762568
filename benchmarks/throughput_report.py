"""Medians, spreads and ratios of benchmarks.throughput, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.throughput_peer import Peer

BASELINE = "trl"
"""The denominator of the ratios; if it was not measured, the first measured variant is used."""


def summarise(peers: Sequence[Peer]) -> dict[str, Any]:
    """{"baseline": name or None, "variants": {name: row}}; the row of a peer without a turn has no "tokens_per_second".

    tokens_per_second is the median over the turns of total tokens / total seconds; ratio is the median over the rounds
    of the quotient with the baseline in the same round. Both come with lowest and highest.
    """
    rates = {peer.name: {turn["round"]: turn_rate(turn) for turn in peer.turns} for peer in peers}
    measured = [name for name, turns in rates.items() if turns]
    baseline = BASELINE if BASELINE in measured else next(iter(measured), None)
    variants = {}
    for peer in peers:
        row: dict[str, Any] = {"error": peer.error, **peer.info, "turns": peer.turns}
        if rates[peer.name]:
            assert baseline is not None
            common = rates[peer.name].keys() & rates[baseline].keys()
            ratios = [rates[peer.name][number] / rates[baseline][number] for number in sorted(common)]
            row |= _figures(peer.turns)
            row["tokens_per_second"] = _spread(list(rates[peer.name].values()))
            row["ratio"] = _spread(ratios) if ratios else None
        variants[peer.name] = row
    return {"baseline": baseline, "variants": variants}


def measured_steps(turn: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = turn["steps"][turn["left_out"] :]
    return steps


def turn_rate(turn: dict[str, Any]) -> float:
    """Real tokens per second of the measured steps of a turn."""
    steps = measured_steps(turn)
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def last_turn(peer: Peer) -> str:
    return f"failed: {peer.error}" if peer.error else f"{turn_rate(peer.turns[-1]):,.0f} tokens/s"


def _figures(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = [step for turn in turns for step in measured_steps(turn)]
    everything = [step for turn in turns for step in turn["steps"]]
    losses = [step["loss"] for step in everything]
    return {
        "measured_steps": len(steps),
        "median_step_tokens_per_second": median(step["tokens"] / step["seconds"] for step in steps),
        "median_step_seconds": median(step["seconds"] for step in steps),
        "peak_gib": max((turn["peak_gib"] for turn in turns if "peak_gib" in turn), default=None),
        "reserved_gib": max((turn["reserved_gib"] for turn in turns if "reserved_gib" in turn), default=None),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "counts_agree": all(
            turn["trainer_counted"] in (None, [step["tokens"] for step in turn["steps"]]) for turn in turns
        ),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def table(result: dict[str, Any]) -> str:
    """One line per variant: tokens/s with range, tokens/s of the median step, ratio, GiB, losses; or why it failed."""
    lines = [
        f"{'variant':<14} {'tokens/s (lowest-highest)':<28} {'median step':>11} {'ratio':>6}  GiB peak/reserved  loss"
    ]
    for name, row in result["variants"].items():
        if "tokens_per_second" in row:
            lines.append(f"{name:<14} {_cells(row)}")
        if row["error"]:
            lines.append(f"{name:<14} failed: {row['error']}")
    gpu = next((row["gpu"] for row in result["variants"].values() if "gpu" in row), "CPU")
    first, later = (result["warm_up_steps_left_out"][turn] for turn in ("first_turn", "later_turns"))
    warm_up = f"warm-up left out: {first} steps of the first turn, {later} of each later one"
    meaning = (
        "tokens/s: all tokens of a round over all its seconds, median over rounds; ratio: median over rounds of the quotient"
        "\nwithin a round (same texts); median step: median over all measured steps of a step's tokens/s"
    )
    heading = f"measured on {gpu}, {result['date']}; ratio to {result['baseline']}; {warm_up}"
    return "\n".join([heading, meaning, *lines])


def _cells(row: dict[str, Any]) -> str:
    speed, ratio = row["tokens_per_second"], row["ratio"]
    rate = f"{speed['median']:,.0f} ({speed['lowest']:,.0f}-{speed['highest']:,.0f})"
    memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} / {row['reserved_gib']:.1f}"
    losses = " to ".join("none" if loss is None else f"{loss:.3f}" for loss in (row["first_loss"], row["last_loss"]))
    note = "" if row["counts_agree"] else "  (the trainer counted other tokens: see trainer_counted)"
    quotient = f"{ratio['median']:.2f}" if ratio else "-"
    return f"{rate:<28} {row['median_step_tokens_per_second']:>11,.0f} {quotient:>6}  {memory:<17}  {losses}{note}"


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write throughput.png and throughput.svg: one bar per measured variant, with lowest and highest turn, if there is any."""
    rows = {name: row for name, row in result["variants"].items() if "tokens_per_second" in row}
    if not rows:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds = [row["tokens_per_second"] for row in rows.values()]
    middle = [speed["median"] for speed in speeds]
    below = [speed["median"] - speed["lowest"] for speed in speeds]
    above = [speed["highest"] - speed["median"] for speed in speeds]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes.barh(list(rows), middle, xerr=[below, above], color="#4477aa", capsize=3)
    axes.invert_yaxis()
    for place, row in enumerate(rows.values()):
        ratio = f"  {row['ratio']['median']:.2f}x" if row["ratio"] else ""
        label = f" {middle[place]:,.0f}{ratio}"
        axes.annotate(label, (speeds[place]["highest"], place), va="center", xytext=(4, 0), textcoords="offset points")
    axes.set_xlim(0, 1.3 * max(speed["highest"] for speed in speeds))
    gpu = next((row["gpu"] for row in rows.values() if "gpu" in row), "CPU")
    turns = max(len(row["turns"]) for row in rows.values())
    axes.set_xlabel("real tokens per second; median, lowest and highest turn")
    axes.set_title(f"{gpu}, {result['date'][:10]}, {turns} turns each, measured; ratio to {result['baseline']}")
    paths = [folder / "throughput.png", folder / "throughput.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
