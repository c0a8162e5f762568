"""The caveats that a reader must know before quoting a run's result."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.report.source import Json, Source, dig, finite, number
from finetune.run_record import RunRecord

FEW_QUESTIONS = 200  # with fewer, a 95% interval may be wider than 13 points
STOPPED = {
    "interrupted": "was interrupted",
    "budget_stop": "stopped at its budget",
    "failed": "failed",
    "paused": "was paused",
    "running": "was not finished when this was written",
}


def caveats(source: Source) -> list[str]:
    """The caveats that a reader must know before quoting the result, one sentence each."""
    found = _caveats_of_training(source.run) + _caveats_of_evaluation(source)
    return [text for holds, text in found if holds]


def _caveats_of_training(run: RunRecord) -> list[tuple[bool, str]]:
    history = run.history or []
    losses = [finite(row[key]) for row in history for key in ("loss", "eval_loss") if key in row]
    validation = [loss for row in history if (loss := finite(row.get("eval_loss"))) is not None]
    last, lowest = (validation[-1], min(validation)) if validation else (0, 0)
    return [
        (run.status != "done", f"The run {how_it_stopped(run)}: its training is not complete."),
        (None in losses, "A logged loss was not a finite number: training diverged there."),
        *_of_part_of_an_epoch(run),
        (last > 1.02 * lowest, f"Validation loss ended at {last:.3g}, above its lowest value {lowest:.3g}."),
        (not run.git_commit, "The commit of the code that trained is unknown."),
        (bool(run.git_dirty), "The code had changes that are not in the commit of the run record."),
    ]


@dataclass(frozen=True)
class Seen:
    """How many of the `examples` that a run had for training it has trained on: its steps times the examples of each, measured.

    less_than_an_epoch: another whole step would have had examples that it has not seen.
    """

    seen: int
    examples: int
    less_than_an_epoch: bool

    def __str__(self) -> str:
        return f"{self.seen:,} of the {self.examples:,} training examples"


def seen_examples(run: RunRecord) -> Seen | None:
    """None if run.json does not have it. Earlier versions did not write the examples of a step: there the epochs count."""
    data = run.data
    examples = ((data.used or {}).get("train") or (data.counts or {}).get("train")) if data else None
    if not examples or not run.steps:
        return None
    if size := run.step and run.step.batch_size:
        seen = min(run.steps.done * size, examples)
        return Seen(seen, examples, seen + size <= examples)
    epochs = finite(run.epochs)
    return None if epochs is None else Seen(min(round(epochs * examples), examples), examples, epochs < 0.99)


def _of_part_of_an_epoch(run: RunRecord) -> list[tuple[bool, str]]:
    found = seen_examples(run)
    if found is None or not found.less_than_an_epoch:
        return []
    text = f"Training has seen {found} (measured), less than one epoch: the score is of so short a training."
    return [(True, text)]


def _caveats_of_evaluation(source: Source) -> list[tuple[bool, str]]:
    base, tuned, run, evaluation = source.base, source.tuned, source.run, source.evaluation
    if not base and not tuned:
        return [(True, "No evaluation: a loss does not say whether the SQL returns the right rows.")]
    asked, split = (tuned or base)["questions"], evaluation.get("split")
    counts = (run.data.counts if run.data else None) or {}
    all_of_split = counts.get(str(split), 0)
    other_prompt = evaluation.get("prompt_version") != run.prompt_version
    other_questions = bool(base and tuned) and base["questions"] != asked
    no_gold, at_limit, unstable = (
        dig(tuned or base, f"verdicts.gold_{kind}") or 0 for kind in ("failed", "limit", "unstable")
    )
    arbitrary = dig(tuned or base, "by_gold.arbitrary_rows.questions") or 0
    recount = {name: sum(row["verdict"] == "correct" for row in rows) for name, rows in source.rows.items()}
    wrong = [name for name, right in recount.items() if right != evaluation["models"][name]["correct"]]
    return [
        (not tuned, "The tuned model was not evaluated."),
        (not base, "The base model was not evaluated: it may have answered many of the questions before."),
        (other_questions, "Base and tuned model were asked different numbers of questions."),
        (split != "test", f"The questions are from the {split} split, not from the test split."),
        (asked < all_of_split, f"Only {asked} of the {all_of_split} questions of the {split} split were asked."),
        (source.other_data, "Evaluated on data other than the training run's prepared data: leaks are possible."),
        (other_prompt, "Evaluated with another prompt version than the one used in training."),
        (
            asked < FEW_QUESTIONS,
            f"Few questions: each of the {asked} is worth {100 / max(asked, 1):.1f} points.",
        ),
        (no_gold > 0, f"Gold queries that failed: {no_gold}; these questions count as wrong."),
        (
            at_limit > 0,
            f"Gold queries that hit a limit: {at_limit}; these questions count as wrong, whatever the answer.",
        ),
        (unstable > 0, f"Gold queries that give another result each time: {unstable}; these questions count as wrong."),
        *_hollow(base, tuned),
        *_of_answers(source),
        (
            arbitrary > 0,
            f"In {arbitrary} gold queries LIMIT cuts between rows of equal rank: other answers would be as right.",
        ),
        (
            bool(wrong),
            f"The recorded answers ({', '.join(wrong)}) do not match the counts in eval.json: evaluate again.",
        ),
        (len(recount) < bool(base) + bool(tuned), "A file of recorded answers is missing: fewer examples are shown."),
    ]


def _hollow(base: Json, tuned: Json) -> list[tuple[bool, str]]:
    """That some gold queries are satisfied by a constant, or depend on the time or on chance, and the scores without them."""
    from finetune.evaluation.score import CAN_TELL  # here, because it loads the parser

    kinds = dig(tuned or base, "by_gold") or {}
    counts = {
        kind: dig(group, "questions") or 0
        for kind, group in kinds.items()
        if kind not in (*CAN_TELL, "failed", "limit", "unstable")
    }
    asked, hollow = (tuned or base)["questions"], sum(counts.values())
    shares = [
        f"the {name} model has {share:.1%}"
        for name, model in (("base", base), ("tuned", tuned))
        if (share := number(model, "without_hollow.execution_accuracy")) is not None
    ]
    which = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    without = f"without them {' and '.join(shares)}" if shares else "no question is left without them"
    text = f"Hollow gold queries, which a constant answers or which depend on the time: {hollow} of {asked} ({which}); {without}."
    return [(hollow > 0, text)]


def _of_answers(source: Source) -> list[tuple[bool, str]]:
    """Answers that were cut, missing, or only run in part."""
    models = {"base": source.base, "tuned": source.tuned}

    def counts(path: str) -> str:
        found = {name: dig(model, path) or 0 for name, model in models.items() if model}
        return ", ".join(f"{count} of the {name} model" for name, count in found.items()) if any(found.values()) else ""

    limit = dig(source.run.config, "model.max_seq_length")
    lengths = [row.get("prompt_tokens") for row in next(iter(source.rows.values()), [])]
    long = sum(isinstance(length, int) and isinstance(limit, int) and length > limit for length in lengths)
    too_long, no_memory, several = map(counts, ("verdicts.too_long", "verdicts.out_of_memory", "several_statements"))
    return [
        (
            bool(too_long),
            f"Too long for the model's positions, prompt or prompt with answer: {too_long}; these questions count as wrong.",
        ),
        (
            bool(no_memory),
            f"Prompts that did not fit into memory, even alone: {no_memory}; these questions count as wrong.",
        ),
        (
            long > 0,
            f"Prompts longer than the {limit} tokens (model.max_seq_length) of the longest training example: {long}.",
        ),
        (
            bool(several),
            f"Answers with more than one statement: {several}. Only the first query of an answer is run, and generation ends "
            "with it; the official evaluators run the whole text, and such an answer fails there.",
        ),
    ]


def how_it_stopped(run: RunRecord) -> str:
    how = STOPPED.get(str(run.status), f"has the status {run.status}")
    return f"{how} after {run.steps.done} of {run.steps.planned} planned steps" if run.steps else how
