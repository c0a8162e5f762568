"""The scores of a vote over samples, of pass@k and of retries beside the greedy one, each with its gain and its cost, from
eval.json."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.evaluation.statistics import enough_databases
from finetune.report.source import Json, dig, number
from finetune.runtime.quantities import usd_text

Interval = list[float]


@dataclass(frozen=True)
class Variant:
    """One way to use the tuned model. The texts are "" where eval.json does not say.

    right: share and count. change: points over the greedy answers. counts: questions won and lost. intervals: of the change.
    test: the exact test. cost: what it took beyond the greedy answers.
    """

    name: str
    right: str
    change: str = ""
    counts: str = ""
    intervals: str = ""
    test: str = ""
    cost: str = ""

    def line(self) -> str:
        change = ", ".join(part for part in (self.counts, self.intervals, self.test) if part)
        parts = (f"{self.right}", f"{self.change} over greedy ({change})" if self.change else "", self.cost)
        return f"{self.name}: {'; '.join(part for part in parts if part)}"


def variants(tuned: Json) -> list[Variant]:
    """The greedy answers and what was measured beside them; empty if that is nothing. tuned: models.tuned of eval.json."""
    found = [
        *_of(
            dig(tuned, "samples.vote"),
            dig(tuned, "samples.gain.vote"),
            _vote_name(tuned),
            cost_text(dig(tuned, "samples.cost")),
        ),
        *_of(dig(tuned, "samples.pass_at"), dig(tuned, "samples.gain.pass_at"), _pass_name(tuned), "the same samples"),
        *_of(
            dig(tuned, "retry.score"), dig(tuned, "retry.gain"), _retry_name(tuned), cost_text(dig(tuned, "retry.cost"))
        ),
    ]
    return [Variant("greedy", right_text(tuned)), *found] if found else []


def sentences(tuned: Json) -> list[str]:
    """What the table does not show."""
    found = []
    samples, asked = dig(tuned, "samples"), dig(tuned, "retry.asked")
    if not isinstance(samples, dict):
        samples = {}
    by_k = samples.get("pass_at_k")
    shares = [(k, number(samples, f"pass_at_k.{k}")) for k in (by_k if isinstance(by_k, dict) else ())]
    known = [f"pass@{k} {share:.1%}" for k, share in shares if share is not None]
    if known:
        found.append(
            f"With {samples.get('n')} samples at temperature {samples.get('temperature')}, seed {samples.get('seed')}: "
            f"{', '.join(known)} (unbiased estimates). pass@k counts a question if any of k samples is right: what a perfect "
            "choice would reach, not what a user gets."
        )
    if samples and (none := samples.get("no_result")) is not None:
        found.append(
            f"No sample ran in {none} questions, and all samples agreed in {samples.get('unanimous')}. The vote sees "
            "results, never gold queries."
        )
    if asked and isinstance(asked, list):
        found.append(
            f"Asked again with the error message, because their SQL did not run: {' then '.join(map(str, asked))} questions."
        )
    return found


def _of(scores: Json | None, gain: Json | None, name: str, cost: str) -> list[Variant]:
    if not scores:
        return []
    counts, questions = dig(gain, "gain") or {}, scores["questions"]
    if not counts:
        return [Variant(name, right_text(scores), cost=cost)]
    won, lost, p = counts["won"], counts["lost"], number(gain or {}, "exact_p")
    intervals = [
        f"{_points(bounds)} over {what}"
        for what in ("questions", *["databases"] * enough_databases(scores))
        if (bounds := dig(gain, f"gain_interval95.{what}"))
    ]
    return [
        Variant(
            name,
            right_text(scores),
            f"{100 * (won - lost) / max(questions, 1):+.1f} points",
            f"{won} won, {lost} lost",
            ", ".join(intervals),
            "" if p is None else f"p = {p:.2g}",
            cost,
        )
    ]


def right_text(scores: Json) -> str:
    return f"{scores['execution_accuracy']:.1%} ({scores['correct']} of {scores['questions']})"


def cost_text(cost: Json | None) -> str:
    """What answers took: seconds and tokens (measured), dollars (estimated from them and a price)."""
    seconds, tokens = number(cost or {}, "seconds"), number(cost or {}, "new_tokens")
    if seconds is None or tokens is None:
        return ""
    usd = number(cost or {}, "usd")
    dollars = "price unknown" if usd is None else f"{usd_text(usd)} (estimated)"
    return f"{seconds:,.1f} s, {tokens:,.0f} new tokens (measured), {dollars}"


def _points(bounds: Interval) -> str:
    low, high = (f"{100 * bound:+.1f}" for bound in bounds)
    return f"{low} to {high}"


def _vote_name(tuned: Json) -> str:
    return f"vote of {dig(tuned, 'samples.n')}"


def _pass_name(tuned: Json) -> str:
    return f"pass@{dig(tuned, 'samples.n')}"


def _retry_name(tuned: Json) -> str:
    return f"greedy, {dig(tuned, 'retry.rounds')} more {'try' if dig(tuned, 'retry.rounds') == 1 else 'tries'} after an error"
