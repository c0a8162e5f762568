"""What `finetune compare` compares: reads the verdicts on each model's answers, and refuses what cannot be compared."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from finetune.data.records import read_lines
from finetune.errors import UserError, shown
from finetune.evaluation.paired import is_right
from finetune.evaluation.score import Row
from finetune.report.source import Json, dig, evaluation_problem, not_finite, rows_file, scores_problem
from finetune.run_record import read_record
from finetune.runtime.commands import as_command, evaluate_command
from finetune.runtime.files import names_in, read_json
from finetune.runtime.paths import expanded

PREDICTIONS = "predictions"
TEXTS = ("id", "db_id", "question", "difficulty", "gold", "prediction", "answer", "verdict", "gold_sha256", "gold_kind")
TEXTS_OR_NONE = ("error", "error_class")
TRUE_OR_FALSE = ("double_quoted_text", "several_statements")
COUNTS = ("new_tokens",)
COUNTS_OR_NONE = ("prompt_tokens",)
BEYOND_GREEDY = {"vote": ("samples.vote", "samples.vote.rows"), "retry": ("retry.score", "retry.rows")}
"""Name -> where its scores and the name of its rows are in those of the tuned model."""
RULE_KEYS = ("rule", "timeout_seconds")
"""Of eval.json files that earlier versions wrote; newer ones have all that verdicts depend on, under `judging`."""


@dataclass(frozen=True)
class Compared:
    """The answers of one model and their verdicts.

    label: its name in the comparison. evaluation: eval.json; scores: what it has about these answers. again: the words of the
    command that judges these answers again. trained_on: the SHA-256 of the manifest of its training data, None if unknown.
    """

    label: str
    given: str
    folder: Path
    scores: Json
    evaluation: Json
    rows: dict[str, Row]
    again: tuple[str, ...]
    trained_on: str | None

    @property
    def judging(self) -> Json:
        """What the verdicts depend on apart from answers and golds, by key of the section evaluation, as far as it is known."""
        known = dig(self.evaluation, "judging")
        return known if isinstance(known, dict) else {key: self.evaluation.get(key) for key in RULE_KEYS}

    @property
    def split(self) -> Any:
        return self.evaluation.get("split")

    @property
    def data(self) -> Any:
        return self.evaluation.get("data_manifest_sha256")


@dataclass(frozen=True)
class Common:
    """The questions that are compared, in the order of the reference. left_out: sentences on those that are not."""

    ids: list[str]
    left_out: list[str]


def read_all(given: Sequence[str]) -> list[Compared]:
    """The models that the words name, the reference first. Raises UserError if one is not evaluated, or named twice."""
    found = [read_compared(word) for word in given]
    places = [(one.folder.resolve(), one.label) for one in found]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{found[number].given}: is given twice; compare it with another one", code="compare.same")
    labels = [one.label for one in found]
    return [replace(one, label=one.given) if labels.count(one.label) > 1 else one for one in found]


def read_compared(given: str) -> Compared:
    """given: a run's folder (its tuned model), RUN:NAME, or the folder of a result of `evaluate --predictions`. NAME: base,
    vote, retry, or the name of predictions that were judged for the run."""
    folder, model = _place(given)
    is_run = (folder / "config.yaml").is_file()
    path = folder / "eval.json"
    name = folder.resolve().name
    if model and is_run and model not in (_models(path) if path.is_file() else ()):
        path = folder / "eval" / f"{PREDICTIONS}-{model}.json"
        if not path.is_file():
            raise UserError(
                f"{given}: {folder} has no model {shown(model)}; there are {', '.join(_names(folder)) or 'none'}",
                code="compare.not_evaluated",
            )
        return _read(given, f"{name}:{model}", folder, path, PREDICTIONS)
    if not path.is_file():
        what = (
            f"a run that was not evaluated; run `{evaluate_command(folder)}` first"
            if is_run
            else "neither a run folder nor a result of `finetune evaluate --predictions` (no config.yaml and no eval.json)"
        )
        raise UserError(f"{folder}: {what}", code="compare.not_evaluated")
    models = _models(path)
    wanted = model or ("tuned" if is_run or len(models) != 1 else models[0])
    if wanted not in models:
        raise UserError(
            f"{path}: holds no score of {shown(wanted)}, only of {', '.join(models) or 'none'}; run "
            f"`{evaluate_command(folder)}`, or name another one, as {folder}:{models[0] if models else 'base'}",
            code="compare.not_evaluated",
        )
    label = name if wanted in ("tuned", PREDICTIONS) else f"{name}:{wanted}"
    return _read(given, label, folder, path, wanted)


def common_questions(compared: Sequence[Compared], *, common: bool) -> Common:
    """Raises UserError for verdicts that came about in another way, and, unless `common`, for other questions, golds or data."""
    first = compared[0]
    for other in compared[1:]:
        _check_judging(first, other)
    shared = [name for name in first.rows if all(name in other.rows for other in compared)]
    changed = {name for name in shared if len({_question(one.rows[name]) for one in compared}) > 1}
    same = [name for name in shared if name not in changed]
    if not same:  # before anything advises --common
        raise _nothing_in_common(first, compared[1:])
    left_out = [] if all(other.data == first.data for other in compared) else [_other_data(first, compared, common)]
    everywhere = {name for one in compared for name in one.rows}
    if len(shared) < len(everywhere):
        counts = ", ".join(f"{one.label} {len(one.rows)}" for one in compared)
        fact = f"other questions: {counts}, {len(shared)} of them in common"
        left_out.append(_refused(fact, common))
    if changed:
        first_changed = shown(next(name for name in shared if name in changed))
        fact = f"{len(changed)} questions have another text, database or gold query under the same id, first {first_changed}"
        left_out.append(_refused(fact, common))
    return Common(same, left_out)


def _nothing_in_common(first: Compared, others: Sequence[Compared]) -> UserError:
    """With the command that asks one of them the split of the other, where that is why."""
    fact = f"{first.label} and {' and '.join(one.label for one in others)}: no question in common, so there is nothing to compare"
    other = next((one for one in others if one.split != first.split), None)
    if other is not None and other.split and first.split:
        fact += f"; {first.label} was asked the split {first.split}, {other.label} the split {other.split}"
        asked = [(one, like) for one, like in ((other, first), (first, other)) if PREDICTIONS not in one.evaluation]
        if asked:
            one, like = asked[0]
            fact += f": ask both the same with `{as_command(*one.again, f'evaluation.split={like.split}')}`"
    return UserError(fact, code="compare.other_questions")


def _question(row: Row) -> tuple[str, ...]:
    return row.question, row.db_id, row.gold


def _refused(fact: str, common: bool) -> str:
    if not common:
        raise UserError(f"{fact}; add --common to compare on the common ones only", code="compare.other_questions")
    return f"{fact[0].upper()}{fact[1:]}; only the common ones are compared."


def _other_data(first: Compared, compared: Sequence[Compared], common: bool) -> str:
    other = next(one for one in compared if one.data != first.data)
    fact = (
        f"other prepared data: {first.label} was evaluated on the manifest {shown(first.data)}, "
        f"{other.label} on {shown(other.data)}"
    )
    if not common:
        raise UserError(
            f"{fact}; evaluate both on the same data, or add --common to compare on the questions of the same text and gold "
            "query",
            code="compare.other_data",
        )
    return f"{fact[0].upper()}{fact[1:]}; the same databases may hold other rows."


def _check_judging(first: Compared, other: Compared) -> None:
    """Raises UserError, with the command that judges the second one as the first."""
    wanted, found = first.judging, other.judging
    keys = [key for key in wanted if key in found and wanted[key] != found[key]]
    if not keys:
        return
    changes = [
        f"evaluation.{key}={'null' if wanted[key] is None else wanted[key]}" for key in keys if key != "versions"
    ]
    how = ", ".join(
        f"{'versions of judge, SQLite and sqlglot' if key == 'versions' else 'evaluation.' + key} {shown(wanted[key])} and "
        f"{shown(found[key])}"
        for key in keys
    )
    again = [shlex.join([*one.again, *changes]) for one in ((first, other) if "versions" in keys else (other,))]
    raise UserError(
        f"{first.label} and {other.label} were judged differently: {how}; judge again: `{'` and `'.join(again)}`",
        code="compare.other_rule",
    )


def _place(given: str) -> tuple[Path, str | None]:
    """The folder and the model that a word names."""
    whole = Path(expanded(given))
    if whole.is_dir():
        return whole, None
    folder, colon, model = given.rpartition(":")
    if colon and folder and Path(expanded(folder)).is_dir():
        return Path(expanded(folder)), model
    found = "expected a folder, found a file" if whole.exists() else "no such folder"
    raise UserError(
        f"{given}: {found}; give a run's folder, RUN:base, or the folder of a result of `finetune evaluate --predictions`",
        code="compare.not_found",
    )


def _models(path: Path) -> list[str]:
    return list(_scores(read_json(path, evaluate_command(path.parent))))


def _scores(evaluation: Json) -> Json:
    """What eval.json has about each model, by name, and about what the tuned one can do beyond its greedy answers."""
    models = dig(evaluation, "models")
    found = dict(models) if isinstance(models, dict) else {}
    for name, (scores, rows) in BEYOND_GREEDY.items():
        if isinstance(there := dig(evaluation, f"models.tuned.{scores}"), dict):
            found[name] = there | {"rows": dig(evaluation, f"models.tuned.{rows}")}
    return {name: scores for name, scores in found.items() if scores}


def _names(folder: Path) -> list[str]:
    """What may follow the colon after a run's folder."""
    known = _models(folder / "eval.json") if (folder / "eval.json").is_file() else []
    start, end = f"{PREDICTIONS}-", ".json"
    files = sorted(name for name in names_in(folder / "eval") if name.startswith(start) and name.endswith(end))
    return [*known, *(name[len(start) : -len(end)] for name in files)]


def _read(given: str, label: str, folder: Path, path: Path, model: str) -> Compared:
    plain = evaluate_command(folder)
    evaluation = read_json(path, plain)
    if (place := not_finite(evaluation)) is not None:
        raise UserError(f"{path}: {place}: NaN or infinite; run `{plain}` again", code="compare.bad_input")
    scores = _scores(evaluation)[model]
    if problem := evaluation_problem(evaluation) or scores_problem(scores):
        raise UserError(f"{path}: {problem}; run `{plain}` again", code="compare.bad_input")
    again = _again(folder, evaluation)
    command = shlex.join(again)
    file = rows_file(folder, model, scores.get("rows"), command)
    if file is None or not file.is_file():
        raise UserError(
            f"{path}: the file of {shown(model)}'s answers ({shown(scores.get('rows'))}) is missing; run `{command}` again",
            code="compare.bad_input",
        )
    rows = _read_rows(file, command)
    right = sum(map(is_right, rows.values()))
    if (len(rows), right) != (scores["questions"], scores["correct"]):
        raise UserError(
            f"{file}: {right} of {len(rows)} are correct, but {path.name} says {scores['correct']} of {scores['questions']}; run "
            f"`{command}` again",
            code="compare.bad_input",
        )
    return Compared(label, given, folder, scores, evaluation, rows, again, _trained_on(folder))


def _again(folder: Path, evaluation: Json) -> tuple[str, ...]:
    known = evaluation.get(PREDICTIONS)
    if not isinstance(known, dict):
        return "finetune", "evaluate", str(folder)
    overrides = known.get("overrides")
    words = overrides if isinstance(overrides, list) else []
    options = ("--predictions", str(known.get("file")), "--name", str(known.get("name")))
    return "finetune", "evaluate", str(known.get("target")), *options, *map(str, words)


def _trained_on(folder: Path) -> str | None:
    path = folder / "run.json"
    data = read_record(path).data if path.is_file() else None
    return data.manifest_sha256 if data else None


def _read_rows(path: Path, command: str) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for line in read_lines(path):
        problem = line.problem or _row_problem(line.value)
        if not problem and line.value["id"] in rows:
            problem = f"the id {shown(line.value['id'])} is there twice"
        if problem:
            raise UserError(f"{line.place(path)}: {problem}; run `{command}` again", code="compare.bad_input")
        names = [field.name for field in fields(Row) if field.name not in NOT_COMPARED]
        known = {name: line.value[name] for name in names if name in line.value}
        rows[line.value["id"]] = Row(**known)
    return rows


def _row_problem(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"expected an object, found {shown(value)}"
    if absent := [field.name for field in fields(Row) if field.name not in value and field.name not in ADDED_LATER]:
        return f"lacks {', '.join(absent)}"
    wrong = [key for key in TEXTS if not isinstance(value[key], str)]
    wrong += [key for key in TEXTS_OR_NONE if not isinstance(value.get(key), str | None)]
    wrong += [key for key in TRUE_OR_FALSE if not isinstance(value.get(key, False), bool)]
    wrong += [key for key in COUNTS if type(value.get(key, 0)) is not int]
    wrong += [key for key in COUNTS_OR_NONE if type(value.get(key, 0)) not in (int, NoneType)]
    verdicts = value["verdicts"]
    if not isinstance(verdicts, dict) or not all(isinstance(verdict, str) for verdict in verdicts.values()):
        wrong.append("verdicts")
    return f"{wrong[0]}: not of the right type" if wrong else None


NOT_COMPARED = ("gold_sample", "result_sample")
ADDED_LATER = ("prompt_tokens", "several_statements", "result_sha256", "error_class", *NOT_COMPARED)
"""Fields of a row that a comparison can do without."""
