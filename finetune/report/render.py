"""Writes the report of a run, on one page: run.json + eval.json -> report.html, report.md and summary.json.

This module computes the figures and sentences, `caveats` the warnings, `bars` and `plots` the figures, `questions` the table of
all questions; the templates define the layout, and `source` reads the input. A missing part (no evaluation, no base model, a run
that stopped early) is reported as such and does not prevent the report.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.report.bars import OF_DIFFICULTY, Group, group_bars, overall
from finetune.report.beyond_greedy import sentences, variants
from finetune.report.caveats import caveats, how_it_stopped
from finetune.report.certainty import certainty, intervals_in_words, points
from finetune.report.errors import error_rows
from finetune.report.examples import examples
from finetune.report.machines import capability, machines
from finetune.report.pages import embedded, pages, script
from finetune.report.plots import draw_plots
from finetune.report.questions import MEANING, questions_data
from finetune.report.score_facts import facts
from finetune.report.source import (
    Json,
    Source,
    attempt_rows,
    budget_lines,
    dig,
    finite,
    memory_lines,
    number,
    read_run,
)
from finetune.report.trained_databases import marked, trained_databases
from finetune.runtime.commands import evaluate_command
from finetune.runtime.files import write_json, write_text
from finetune.runtime.quantities import usd_text
from finetune.runtime.typed_json import encode

WILSON = "right answers with their 95% intervals over questions (Wilson)"
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'|`[^`]*`")
AFTER_WORDS = ("table", "named")
"""Words that SQLite's messages put before a name without quotes: table t has no column named c."""


@dataclass(frozen=True)
class Tile:
    """One key figure; `basis` is measured, estimated or unknown."""

    label: str
    value: str
    note: str
    basis: str


def write_report(run_dir: Path) -> Json:
    """Write report.html, report.md and summary.json into the run folder. Returns the content of summary.json.

    Raises UserError, before anything is written, if run.json is missing or an input file is broken.
    """
    source = read_run(run_dir)
    summary = summarise(source)
    for name, text in render(source, summary).items():
        write_text(run_dir / name, text)
    write_json(run_dir / "summary.json", summary)
    return summary


def summarise(source: Source) -> Json:
    """The content of summary.json: accuracies from 0 to 1, minutes of training, GiB, US dollars; None if unknown."""
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
    """The result in one sentence that can be quoted on its own."""
    base, tuned = source.base, source.tuned
    if not base and not tuned:
        return f"Not evaluated, so its accuracy is unknown. To measure it: {evaluate_command(source.folder)}"
    split = str(source.evaluation.get("split"))
    scored = tuned or base
    kind = "held-out" if split == "test" else split
    text = f"{scored['correct']} of {scored['questions']} {kind} questions with the right rows"
    text += f" ({scored['execution_accuracy']:.1%}{intervals_in_words(scored)})"
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
    """The key figures, each with its basis: measured, estimated or unknown."""
    models = [model for model in (source.base, source.tuned) if model]
    only = "" if len(models) != 1 else " (tuned model only)" if source.tuned else " (base model only)"
    correct = " → ".join(str(model["correct"]) for model in models)
    scored = f"{correct} of {summary['questions']} questions{only}" if models else "not evaluated"
    if models and (interval := models[-1].get("execution_accuracy_interval95")):
        scored += f", 95% interval {points(interval)}"
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
        Tile("Cost", "" if summary["spent_usd"] is None else usd_text(summary["spent_usd"]), price, "estimated"),
    ]
    return [tile if tile.value else replace(tile, value="unknown", basis="unknown") for tile in found]


def verdicts(source: Source) -> list[tuple[str, int | None, int | None]]:
    """(verdict, base count, tuned count), correct answers first; a count is None if that model was not evaluated."""
    base, tuned = source.base.get("verdicts"), source.tuned.get("verdicts")
    last = tuned or base or {}
    names = sorted({**(base or {}), **last}, key=lambda name: (name != "correct", -last.get(name, 0), name))
    return [(name, base.get(name, 0) if base else None, tuned.get(name, 0) if tuned else None) for name in names]


def common_errors(rows: list[Json]) -> list[tuple[str, int, str]]:
    """The five most frequent kinds of error: (kind, count, an example)."""
    messages = sorted(" ".join(str(row["error"]).split())[:200] for row in rows if row.get("error"))
    kinds = Counter(kind_of_error(message) for message in messages)
    example = {kind_of_error(message): message for message in reversed(messages)}
    return [(kind, n, example[kind]) for kind, n in kinds.most_common(5)]


def kind_of_error(message: str) -> str:
    """What databases say about one kind of mistake, without the names, texts and numbers of the query.

    `near "FROM": syntax error` is a syntax error, `no such column: a.b` is no such column.
    """
    text = QUOTED.sub("…", message)
    head, colon, rest = text.partition(": ")
    if colon:
        text = rest if "…" in head else head
    for name in AFTER_WORDS:
        text = re.sub(rf"\b{name} (?!…)\S+", f"{name} …", text)
    return re.sub(r"[\w.]+\(\)", "…()", re.sub(r"\b\d+\b", "N", text))


def render(source: Source, summary: Json) -> dict[str, str]:
    """File name -> page."""
    from omegaconf import OmegaConf

    environment = pages()
    content = {
        "source": source,
        "record": _record(source),
        "summary": summary,
        "headline": headline(source),
        "tiles": tiles(source, summary),
        "machines": machines(source.run, source.folder),
        "capability": capability,
        "groups": _groups(source),
        "plots": draw_plots(source.run.history or []),
        "verdicts": verdicts(source),
        "meaning": MEANING,
        "error_rows": error_rows(source),
        "errors": {name: common_errors(rows) for name, rows in source.rows.items()},
        "examples": examples(source),
        "questions": embedded(questions_data(source)) if source.rows else None,
        "script": script(environment, "table.js", "questions.js"),
        "certainty": certainty(source),
        "variants": variants(source.tuned),
        "variant_sentences": sentences(source.tuned),
        "score_facts": facts(source.evaluation),
        "caveats": caveats(source),
        "memory": memory_lines(source.run),
        "budget": budget_lines(source.run),
        "attempts": attempt_rows(source.run),
        "yaml": lambda value: OmegaConf.to_yaml(OmegaConf.create(value)),
    }
    return {name: environment.get_template(f"{name}.j2").render(content) for name in ("report.html", "report.md")}


def _groups(source: Source) -> list[Group]:
    """The shares of right answers; empty if nothing was evaluated."""
    base, tuned = source.base, source.tuned
    if not base and not tuned:
        return []
    by = {key: group_bars(base.get(key) or {}, tuned.get(key) or {}) for key in ("by_difficulty", "by_database")}
    return [
        Group("Accuracy by difficulty", WILSON, [overall(base, tuned), *by["by_difficulty"]], note=OF_DIFFICULTY),
        marked(Group("Accuracy by database", WILSON, by["by_database"]), trained_databases(source)),
    ]


def _record(source: Source) -> Json:
    """run.json as the report shows it."""
    record: Json = encode(source.run)
    gpu = dig(record, "hardware.gpu")
    if gpu and gpu.get("compute_capability") is not None:
        gpu["compute_capability"] = capability(gpu["compute_capability"])
    return record
