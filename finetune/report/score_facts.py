"""What must be known with every score, in a few lines: leaks, hollow golds, speed, dollars, and what a gained point cost. From
eval.json; the same lines for the console and the report."""

from __future__ import annotations

from finetune.evaluation.statistics import enough_databases
from finetune.report.beyond_greedy import variants
from finetune.report.errors import error_lines
from finetune.report.source import Json, dig, number
from finetune.runtime.quantities import usd_text


def score_line(scores: Json) -> str:
    """Accuracy with its intervals, valid SQL, and the score without hollow golds where it is another one."""
    right = f"{scores['correct']} of {scores['questions']}"
    of_databases = scores.get("execution_accuracy_interval95_by_database") if enough_databases(scores) else None
    intervals = [
        f"{_interval(bounds)} over {what}"
        for what, bounds in (("questions", scores.get("execution_accuracy_interval95")), ("databases", of_databases))
        if bounds
    ]
    valid = number(scores, "valid_sql_rate")
    return (
        f"execution accuracy {scores['execution_accuracy']:.1%} ({right}, 95% interval {', '.join(intervals)})"
        + ("" if valid is None else f", valid SQL {valid:.1%}")
        + _without_hollow(scores)
    )


def _without_hollow(scores: Json) -> str:
    telling, asked = dig(scores, "without_hollow.questions"), scores["questions"]
    if telling is None or telling == asked:
        return ""
    if not telling:
        return "; every gold query is hollow: this score says nothing"
    hollow = asked - telling
    share = number(scores, "without_hollow.execution_accuracy")
    return f"; without {hollow} hollow gold{'s' if hollow > 1 else ''} {share or 0.0:.1%}"


def speed_line(scores: Json) -> str:
    """Tokens a second after loading, and the dollars of the answers; "" if eval.json has no cost."""
    seconds, tokens = number(scores, "cost.seconds"), number(scores, "cost.new_tokens")
    if seconds is None or tokens is None:
        return ""
    rate, loading = number(scores, "cost.new_tokens_per_second"), number(scores, "cost.loading_seconds")
    speed = "" if rate is None else f", {rate:,.0f} tokens/s"
    apart = f", loading {loading:,.1f} s apart" if loading else ""
    return f"{tokens:,.0f} new tokens in {seconds:,.1f} s{speed}{apart} (measured); {dollars(scores['cost'])}"


def dollars(cost: Json) -> str:
    usd = number(cost, "usd")
    if usd is None:
        return "dollars: price unknown"
    return f"{usd_text(usd)} (estimated: measured seconds, price: {cost.get('usd_basis') or 'unknown'})"


def leak_line(evaluation: Json) -> str:
    """What the questions have in common with training; "" if eval.json does not say."""
    leaks = evaluation.get("leaks")
    if not isinstance(leaks, dict):
        return ""
    of_training = leaks.get("data_of_training")
    if of_training is False:
        return "leaks: unknown, because these are not the data that it was trained on"
    removed, shape, asked = (number(leaks, key) for key in ("removed", "same_shape", "questions"))
    start = (
        "leaks: no question and no gold query is in train" if of_training else "leaks: unknown what it was trained on"
    )
    text = f"{start}; {removed or 0:.0f} removed by data prepare (measured)"
    if shape is None or not asked:
        return text
    return f"{text}; {shape:.0f} of the {asked:.0f} gold queries of the split ({shape / asked:.0%}) have a shape that is in train"


def gain_line(evaluation: Json) -> str:
    """The gain with its intervals, and the dollars of a point; "" without a base model."""
    gain = evaluation.get("gain")
    if not gain:
        return ""
    questions = max(1, sum(gain[key] for key in ("won", "lost", "both", "neither")))
    enough = enough_databases(dig(evaluation, "models.tuned") or {})
    intervals = [
        f"{_interval(bounds, '+')} over {what}"
        for what in ("questions", *["databases"] * enough)
        if (bounds := dig(evaluation, f"gain_interval95.{what}"))
    ]
    change = f"{100 * (gain['won'] - gain['lost']) / questions:+.1f} points ({gain['won']} won, {gain['lost']} lost"
    return f"{change}{', 95% interval ' + ', '.join(intervals) if intervals else ''}); {per_point(evaluation)}"


def per_point(evaluation: Json) -> str:
    """The dollars of a point gained, or why there are none."""
    training, scoring, each = (number(evaluation, f"cost.{key}") for key in ("training_usd", "usd", "usd_per_point"))
    if each is not None and training is not None and scoring is not None:
        parts = f"training {usd_text(training)} by the ledger, evaluation {usd_text(scoring)}"
        return f"{usd_text(each)} a point gained (estimated: {parts})"
    points = number(evaluation, "cost.points_gained")
    if points is not None and points <= 0:
        return "dollars a point gained: undefined, nothing was gained"
    unknown = [name for name, usd in (("training", training), ("evaluation", scoring)) if usd is None]
    return (
        f"dollars a point gained: price of {' and '.join(unknown)} unknown"
        if unknown
        else "dollars a point gained: unknown"
    )


def block(evaluation: Json, name: str) -> list[str]:
    """The lines for the console about one model: its score, its speed and dollars; for the tuned one also leaks and what it can
    do beyond its greedy answers."""
    scores = evaluation["models"][name]
    lines = [score_line(scores), *error_lines(scores), speed_line(scores)]
    if name == "tuned":
        lines += [leak_line(evaluation), *(each.line() for each in variants(scores)[1:])]
    return [line for line in lines if line]


def facts(evaluation: Json) -> list[tuple[str, str]]:
    """(label, text) for the report; empty if nothing was evaluated."""
    models = evaluation.get("models") or {}
    speeds = [
        (f"{name.capitalize()} answers", speed_line(models[name])) for name in ("base", "tuned") if models.get(name)
    ]
    leaks = leak_line(evaluation).removeprefix("leaks: ") if models.get("tuned") else ""
    points = per_point(evaluation) if evaluation.get("gain") and evaluation.get("cost") else ""
    return [(label, text) for label, text in [*speeds, ("Leaks", leaks), ("A point gained", points)] if text]


def _interval(bounds: list[float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in bounds)
    return f"{low} to {high}" if sign else f"{low}% to {high}%"
