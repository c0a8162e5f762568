"""What a run was worth, on one page: run.json + eval.json -> report.html, report.md and summary.json.

This file owns the figures and the sentences, `caveats` the warnings, the templates the layout, `plots` the plots, `source`
what they are made from. A part that is missing (no evaluation, no base model, a run that stopped early) is named; it does not
stop the report.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.evaluation.statistics import mcnemar_exact, paired_interval
from finetune.report.caveats import caveats, how_it_stopped
from finetune.report.plots import counts, draw_plots, group_bars
from finetune.report.source import (
    Json,
    Source,
    attempt_rows,
    finite,
    memory_lines,
    number,
    read_run,
    spending_lines,
)
from finetune.runtime.files import write_json, write_text
from finetune.runtime.typed_json import encode

EXAMPLES = 4  # shown of each kind
MOST_CHARACTERS = 600  # shown of one answer; a base model may ramble on for pages


@dataclass(frozen=True)
class Tile:
    """One key figure; `basis` is measured, estimated or unknown."""

    label: str
    value: str
    note: str
    basis: str


@dataclass(frozen=True)
class Answer:
    label: str
    text: str
    verdict: str = ""
    error: str = ""


@dataclass(frozen=True)
class Examples:
    """One kind of outcome, how many questions had it, and a few of them with their answers side by side."""

    title: str
    total: int
    shown: list[tuple[Json, list[Answer]]]


def write_report(run_dir: Path) -> Json:
    """Write report.html, report.md and summary.json into the run folder; return what summary.json holds.

    Raises UserError where run.json is missing or an input file is broken; then nothing is written.
    """
    source = read_run(run_dir)
    summary = summarise(source)
    pages = render(source, summary)
    for name, text in pages.items():
        write_text(run_dir / name, text)
    write_json(run_dir / "summary.json", summary)
    return summary


def summarise(source: Source) -> Json:
    """What summary.json holds: shares from 0 to 1, minutes of training, GiB, US dollars; None: unknown."""
    run, seconds = source.run, finite(source.run.wall_seconds)
    return {
        "status": run.status,
        "model": run.model.name if run.model else None,
        "base_execution_accuracy": number(source.base, "execution_accuracy"),
        "tuned_execution_accuracy": number(source.tuned, "execution_accuracy"),
        "questions": (source.tuned or source.base).get("questions"),
        "minutes": None if seconds is None else round(seconds / 60, 2),
        "peak_memory_gib": finite(run.peak_memory_gib.value) if run.peak_memory_gib else None,
        "tokens_per_second": finite(run.tokens_per_second),
        "spent_usd": finite(run.spent_usd),
    }


def headline(source: Source) -> str:
    """The result in one sentence that may be quoted alone."""
    base, tuned = source.base, source.tuned
    if not base and not tuned:
        return f"Not evaluated, so its accuracy is unknown. To measure it: finetune evaluate {source.folder}"
    split = str(source.evaluation.get("split"))
    scored, interval = tuned or base, (tuned or base).get("execution_accuracy_interval95")
    kind = "held-out" if split == "test" else split
    text = f"{scored['correct']} of {scored['questions']} {kind} questions with the right rows"
    text += f" ({scored['execution_accuracy']:.1%}"
    text += f", 95% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ")"
    if not tuned:
        return f"The base model answers {text}; the tuned model was not evaluated."
    if base:
        gain = tuned["execution_accuracy"] - base["execution_accuracy"]
        change = "up from" if gain > 0 else "down from" if gain < 0 else "as before tuning:"
        text += f", {change} {base['correct']} ({base['execution_accuracy']:.1%})"
    else:
        text += "; the base model was not evaluated, so the gain is unknown"
    if source.run.status != "done":
        text += f"; the run {how_it_stopped(source.run)}"
    return f"Answers {text}."


def tiles(source: Source, summary: Json) -> list[Tile]:
    """The key figures, each with where it comes from."""
    models = [model for model in (source.base, source.tuned) if model]
    only = "" if len(models) != 1 else " (tuned model only)" if source.tuned else " (base model only)"
    correct = " → ".join(str(model["correct"]) for model in models)
    scored = f"{correct} of {summary['questions']} questions{only}" if models else "not evaluated"
    valid = f"ran without an error{only}" if models else "not evaluated"
    run = source.run
    clock = "wall clock" if run.attempts == 1 else f"wall clock of {run.attempts} attempts"
    steps, examples = run.steps and run.steps.done, run.step and run.step.batch_size
    trained = f"{steps:,} steps of {examples} examples, {clock}" if steps and examples else clock
    memory = run.peak_memory_gib.kind if run.peak_memory_gib else "not recorded"
    price = run.spent_basis or "no price was given"

    def shares(key: str) -> str:
        return " → ".join(f"{model[key]:.1%}" for model in models if number(model, key) is not None)

    def figure(key: str, form: str) -> str:
        return "" if summary[key] is None else form.format(summary[key])

    found = [
        Tile("Execution accuracy", shares("execution_accuracy"), scored, "measured"),
        Tile("Valid SQL", shares("valid_sql_rate"), valid, "measured"),
        Tile("Training time", figure("minutes", "{:,.1f} min"), trained, "measured"),
        Tile("Throughput", figure("tokens_per_second", "{:,.0f} tokens/s"), "without padding", "measured"),
        Tile("Peak memory", figure("peak_memory_gib", "{:.2f} GiB"), memory, "measured"),
        Tile("Cost", figure("spent_usd", "${:,.2f}"), price, "estimated"),
    ]
    return [tile if tile.value else replace(tile, value="unknown", basis="unknown") for tile in found]


def significance(source: Source) -> list[str]:
    """What may be concluded from the gain, in sentences; empty where the two models cannot be compared."""
    gain = source.evaluation.get("gain")
    if not gain or not source.base or not source.tuned:
        return []
    won, lost, both, neither = (gain[key] for key in ("won", "lost", "both", "neither"))
    questions = won + lost + both + neither
    points = 100 * (won - lost) / max(questions, 1)
    low, high = (100 * bound for bound in paired_interval(won, lost, questions))
    p = mcnemar_exact(won, lost)
    verdict = "hardly explains" if p < 0.05 else "may explain"
    chance = f"Had tuning no effect, a split as uneven as {won} to {lost} would turn up with probability {p:.2g}"
    return [
        f"Tuning won {won} questions and lost {lost}; {both} were right and {neither} wrong both times.",
        f"The change is {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f} (paired, Agresti-Min).",
        f"{chance} (McNemar's exact test, two-sided). Chance alone {verdict} the change.",
        "Both figures cover the choice of questions; not the choice of databases, nor the training seed.",
    ]


def verdicts(source: Source) -> list[tuple[str, int | None, int | None]]:
    """(verdict, base count, tuned count), right answers first; None where that model was not evaluated."""
    base, tuned = source.base.get("verdicts"), source.tuned.get("verdicts")
    last = tuned or base or {}
    names = sorted({**(base or {}), **last}, key=lambda name: (name != "correct", -last.get(name, 0), name))
    return [(name, base.get(name, 0) if base else None, tuned.get(name, 0) if tuned else None) for name in names]


def common_errors(rows: list[Json]) -> list[tuple[str, int, str]]:
    """The five most frequent kinds of error: (text before the first colon, how often, what once followed)."""
    messages = sorted(" ".join(str(row["error"]).split())[:200] for row in rows if row.get("error"))
    parts = [message.partition(":")[::2] for message in messages]
    kinds = Counter(kind for kind, _ in parts)
    return [(kind, n, dict(reversed(parts))[kind].strip()) for kind, n in kinds.most_common(5)]


def examples(source: Source) -> list[Examples]:
    """A few questions of each outcome, picked by the hash of their id: always the same, nobody's choice."""
    known = {name: {str(row["id"]): row for row in rows} for name, rows in source.rows.items()}
    titles: dict[tuple[bool, ...], str] = {(True,): "Right", (False,): "Wrong"}
    if len(known) == 2:
        titles = {(False, True): "Won", (True, False): "Lost", (False, False): "Still wrong"}
    groups: dict[tuple[bool, ...], list[list[tuple[str, Json]]]] = {outcome: [] for outcome in titles}
    shared = set.intersection(*map(set, known.values())) if known else set()
    for name in sorted(shared, key=lambda name: hashlib.sha256(name.encode()).digest()):
        pair = [(model, known[model][name]) for model in sorted(known)]
        groups.get(tuple(row["verdict"] == "correct" for _, row in pair), []).append(pair)
    return [
        Examples(titles[outcome], len(pairs), [(pair[0][1], _answers(pair)) for pair in pairs[:EXAMPLES]])
        for outcome, pairs in groups.items()
        if known
    ]


def render(source: Source, summary: Json) -> dict[str, str]:
    """File name -> page. What questions, SQL and error messages hold is escaped for the page's language."""
    import jinja2
    from omegaconf import OmegaConf

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("finetune.report"),
        autoescape=lambda name: ".html" in str(name),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=_markdown_inline, counts=counts)
    keys = ("by_difficulty", "by_database")
    groups = {key: group_bars(source.base.get(key) or {}, source.tuned.get(key) or {}) for key in keys}
    content = {
        "source": source,
        "record": encode(source.run),
        "summary": summary,
        "headline": headline(source),
        "tiles": tiles(source, summary),
        "groups": groups,
        "plots": draw_plots(source.run.history or [], *groups.values()),
        "verdicts": verdicts(source),
        "errors": {name: common_errors(rows) for name, rows in source.rows.items()},
        "examples": examples(source),
        "significance": significance(source),
        "caveats": caveats(source),
        "memory": memory_lines(source.run),
        "spending": spending_lines(source.run),
        "attempts": attempt_rows(source.run),
        "yaml": lambda value: OmegaConf.to_yaml(OmegaConf.create(value)),
    }
    names = ("report.html", "report.md")
    return {name: environment.get_template(f"{name}.j2").render(content) for name in names}


def _answers(known: list[tuple[str, Json]]) -> list[Answer]:
    """The gold SQL and what each model answered; the raw answer where no SQL was found in it."""
    answers = [Answer("gold", str(known[0][1].get("gold")))]
    for name, row in known:
        text = str(row.get("prediction") or row.get("answer") or "(nothing)")
        more = len(text) - MOST_CHARACTERS
        text = text[:MOST_CHARACTERS] + (f" … ({more} more characters)" if more > 0 else "")
        answers.append(Answer(f"{name} model", text, row["verdict"], str(row.get("error") or "")))
    return answers


def _markdown_inline(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
