"""What to type after each stage of `finetune`, from the state that it left; of a job on a cloud machine see following_job.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.project_folder import PAIRS, read_project
from finetune.runtime.files import load_json, read_text
from finetune.runtime.overrides import joined_overrides
from finetune.stage_end.tell import Next, finetune

if TYPE_CHECKING:
    from finetune.run_folder import RunFolder

SMALL, LARGE = "configs/demo_cpu.yaml", "configs/mistral_7b_qlora.yaml"
OF_PROJECT = "text2sql.yaml"
"""The config that `finetune init` writes."""
FARMS = Path("data/built/databases/farm_market/farm_market.sqlite")
"""A database of data/build.py, which the demo asks about and does not train on."""
TASK = "sky/train_cheapest.yaml"
DEMO_MINUTES = 10.0
"""Of `make demo`, and of `finetune demo`."""
MORE = 1.1
"""A raised ceiling is so much above what the pace so far needs."""


def after_doctor(*, cloud: bool, missing: bool) -> list[Next]:
    if missing:
        return [finetune("doctor", *["--cloud"] * cloud, why="again, once what is missing is there")]
    if Path(OF_PROJECT).is_file():
        return [finetune(*(("plan",) if cloud else ("data", "prepare")), OF_PROJECT, why="goes on with this project")]
    if not Path(SMALL).is_file():
        return [finetune("init", why="asks for your data, and starts a project with them")]
    if cloud:
        return [finetune("plan", LARGE, why="what a run costs on each GPU")]
    return [finetune("data", "prepare", SMALL, why="the data of the smallest run; or of a config of yours")]


def after_check(config: Path, overrides: Sequence[str], *, rejected: int = 0) -> list[Next]:
    why = f"goes on without the {rejected} rejected" if rejected else "writes what was checked"
    return [finetune("data", "prepare", config, *overrides, why=why)]


def after_faults(config: Path) -> list[Next]:
    """In a project of `finetune init` whose pairs were made of a file of the user: that file is to be repaired."""
    project = read_project(config.parent)
    data = Path(project.asked.get("data") or "") if project is not None else Path()
    if project is None or not data.is_file() or PAIRS not in project.files or project.is_changed(PAIRS):
        return []
    return [
        finetune(
            "init",
            config.parent,
            "--data",
            data,
            "--yes",
            why="once that file is repaired; it names the line of each fault there",
        )
    ]


def after_prepare(
    config: Path,
    overrides: Sequence[str],
    *,
    on_gpu_only: bool,
    is_whole: Callable[[Sequence[str]], bool] = lambda _: True,
) -> list[Next]:
    """on_gpu_only: whether training refuses a CPU. is_whole: whether the config is one with these overrides alone: its only
    model may be the one that was typed."""
    kept = _not_for_preparing_alone(overrides)
    if len(kept) < len(overrides) and not is_whole(kept):
        kept = list(overrides)
    here = "on this machine, with an NVIDIA GPU" if on_gpu_only else "on this machine"
    return [
        finetune("train", config, *overrides, why=here),
        finetune("plan", config, *kept, why="what it costs on each cloud GPU"),
    ]


def _not_for_preparing_alone(overrides: Sequence[str]) -> list[str]:
    """Without a folder of a tokenizer without weights, which is not on another machine. The sources stay, though they need not be
    there either: the prepared data are used only for a config that names them."""
    names = [word.partition("=")[2] for word in overrides if word.startswith("model.name=")]
    tokenizer_alone = any(Path(name).is_dir() and not any(Path(name).glob("*.safetensors")) for name in names)
    dropped = ("model.name=", "model.revision=")
    return [word for word in overrides if not (tokenizer_alone and word.startswith(dropped))]


def after_plain_plan(config: Path, overrides: Sequence[str]) -> list[Next]:
    """Of a plan without any wish about machines: the task as it is, which has an order and ceilings. No task, no command."""
    project = read_project(config.parent)
    task = Path(str((project.asked.get("task") if project is not None else None) or TASK))
    if not task.is_file():
        return []
    envs = _envs_of(task)
    scores = "" if envs.get("EVALUATE") == "0" else " and scores"
    variables = [
        *([] if envs.get("CONFIG") == str(config) else ["--env", f"CONFIG={config}"]),
        *_overrides_variable(overrides),
    ]
    return [finetune("launch", task, *variables, why=f"trains{scores}, under the ceilings of the task")]


def _envs_of(task: Path) -> dict[str, Any]:
    """The variables of a task; none of one that cannot be read, which a launch will say."""
    from finetune.runtime.yaml_file import load_yaml

    with suppress(OSError, ValueError, LookupError, TypeError):
        return dict(load_yaml(read_text(task))["envs"])
    return {}


def after_plan(
    typed: Sequence[str], cheapest: tuple[float, float] | None, *, fits: bool, most_hours: float | None = None
) -> list[Next]:
    """typed: the words of the plan. cheapest: US dollars and hours of the cheapest machine that the ceilings rule out. fits:
    whether any machine is left. most_hours: the ceiling of hours, None without one."""
    if fits:
        return [Next((*typed, "--write", TASK), "this order for a launch")]
    if cheapest is None:
        return [Next((*typed, "--memory"), "what of it needs how much GPU memory")]
    usd, hours = (rounded_up(MORE * value) for value in cheapest)
    raised = ["--max-run-usd", f"{usd:g}"]
    if most_hours is not None and most_hours < hours:
        raised += ["--max-hours", f"{hours:g}"]
    words = _without(typed, "--max-hourly-usd", *raised[::2])
    return [Next((*words, *raised), "with ceilings that the cheapest one fits under, by these estimates")]


def after_written_plan(
    task: Path,
    config: Path,
    overrides: Sequence[str],
    *,
    variables: Sequence[str],
    managed: bool,
    scored: bool,
    usd_per_hour: float | None,
) -> list[Next]:
    """variables: NAME=VALUE of what was typed otherwise than the task says. usd_per_hour: the ceiling, if the task has another
    one: SkyPilot has no option for it."""
    words = ["--env", f"CONFIG={config}", *_overrides_variable(overrides)]
    words += [word for variable in variables for word in ("--env", variable)]
    scores = ", scores" if scored else ""
    why = "a managed job, which survives preemptions" if managed else f"trains{scores}, and takes the machine down"
    before = f"first set max_hourly_cost: {usd_per_hour:g} in it; " if usd_per_hour is not None else ""
    return [finetune("launch", *["--jobs"] * managed, task, *words, why=before + why)]


def _overrides_variable(overrides: Sequence[str]) -> list[str]:
    return ["--env", f"OVERRIDES={joined_overrides(overrides)}"] if overrides else []


def after_launch(cluster: str | None, *, managed: bool) -> list[Next]:
    """cluster: its name, if one was typed."""
    why = "once it runs; the job's last lines say what it has cost and what is next"
    words = ("jobs", "queue") if managed else ("logs", cluster) if cluster else ("status",)
    return [Next(("sky", *words), why)]


def after_training(run: RunFolder) -> list[Next]:
    status = run.record().status
    if status in ("interrupted", "paused"):
        return [finetune("train", "--resume", run.path, why="goes on from the checkpoint")]
    score = finetune("evaluate", run.path, why="its score, and the base model's")
    if status != "budget_stop":
        return [score]
    options = [word for name, value in raised_ceilings(run) for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    more = finetune("train", "--resume", run.path, *options, why="the rest, estimated by the pace so far")
    return [more, finetune("evaluate", run.path, why="the adapter as it is")]


def after_scored_base(config: Path, overrides: Sequence[str]) -> list[Next]:
    return [finetune("train", config, *_without_evaluation(overrides), why="to answer better than that")]


def after_evaluation(run: RunFolder) -> list[Next]:
    return [finetune("report", run.path, why="one page of it")]


def after_predictions(target: Path, folder: Path, name: str) -> list[Next]:
    """target: a run or a config. folder: of the result."""
    from finetune.run_folder import RunFolder

    if target.is_dir():
        return _with_result(target, f"{target}:{name}", RunFolder(target).eval_predictions(name))
    other = newest_evaluated(folder.parent.parent, like=folder / "eval.json")
    return [] if other is None else _with_result(other, str(folder), folder / "eval.json")


def _with_result(run: Path, result: str, scores: Path) -> list[Next]:
    """scores: the file of the result. A run that was asked a sample of its questions shares only that with it, and one that was
    asked another split nothing."""
    if not (run / "eval.json").is_file():
        return [finetune("evaluate", run, why="the run's own score, to compare with")]
    own, wanted = _questions(run / "eval.json"), _questions(scores)
    if own and wanted and own[1] != wanted[1]:
        why = f"the run's own score on that split, to compare with; the one that it has is of {own[1]}"
        return [finetune("evaluate", run, f"evaluation.split={wanted[1]}", why=why)]
    common = [] if own == wanted else ["--common"]
    return [finetune("compare", run, result, *common, why="which is better, and whether that can be said")]


def after_demo(run: RunFolder) -> list[Next]:
    """A question about the database that the demo never trains on, if it is there."""
    if not FARMS.is_file():
        return after_report(run)
    return [
        finetune("ask", run.path, "--db", FARMS, "How many farms are there?", why="a database that it has never seen")
    ]


def after_stopped_demo(config: Path, overrides: Sequence[str], minutes: float, typed: Sequence[str]) -> list[Next]:
    """typed: the words of the command."""
    if not is_make_demo(config, overrides):
        return [finetune(*typed, why="goes on where it was")]
    more = [f"DEMO_MINUTES={minutes:g}"] if minutes != DEMO_MINUTES else []
    return [Next(("make", "demo", *more), "goes on where it was")]


def is_make_demo(config: Path, overrides: Sequence[str]) -> bool:
    """Whether the targets of the Makefile are about this demo, and are there."""
    return config == Path(SMALL) and not overrides and Path("Makefile").is_file()


def after_report(run: RunFolder) -> list[Next]:
    if not run.adapter.is_dir():
        return []
    if not run.eval_json.is_file():
        return [finetune("evaluate", run.path, why="its score is missing")]
    other = newest_evaluated(run.path.parent, like=run.eval_json)
    compare = [finetune("compare", other, run.path, why="with the run scored before it")] if other else []
    return [finetune("export", run.path, "--to", "merged", why="for vLLM, transformers and `finetune serve`"), *compare]


def after_comparison(given: Sequence[str], accuracies: Sequence[float]) -> list[Next]:
    """The best one is exported, if it is a run's tuned model."""
    best, word = max(zip(accuracies, given, strict=True), key=lambda pair: pair[0])
    if not (Path(word) / "config.yaml").is_file():
        return []
    return [finetune("export", word, "--to", "merged", why=f"the one with the most right answers, {best:.1%}")]


def after_export(target: Path) -> list[Next]:
    return [finetune("serve", target, why="an endpoint for it on this machine")]


def after_serving(typed: Sequence[str]) -> list[Next]:
    """typed: the words of the command. They hold no secret: a key is in a variable, of which they have the name."""
    return [finetune(*typed, why="serves it again")]


@dataclass(frozen=True)
class Needed:
    """What a whole run would take at its pace so far. Estimated; None where no step is done, or without a price."""

    usd: float | None
    hours: float | None


def needed(run: RunFolder) -> Needed:
    steps, spent = run.record().steps, Ledger(run.ledger).account()
    if steps is None or not steps.done or not steps.planned:
        return Needed(None, None)
    factor = MORE * steps.planned / steps.done
    return Needed(None if spent.usd is None else factor * spent.usd, factor * spent.hours)


def raised_ceilings(run: RunFolder) -> list[tuple[str, float]]:
    """Keys of the section budget, with the ceilings under which a run that was stopped at one of them would end."""
    budget, whole = run.config().budget, needed(run)
    ceilings = {
        name: (ceiling, need)
        for name, ceiling, need in (
            ("max_run_usd", budget.max_run_usd, whole.usd),
            ("max_hours", budget.max_hours, whole.hours),
        )
        if ceiling is not None
    }
    low = {name: need for name, (ceiling, need) in ceilings.items() if need is not None and need > ceiling}
    return [(name, rounded_up(need)) for name, need in low.items()] or [
        (name, rounded_up(2 * ceiling)) for name, (ceiling, _) in ceilings.items()
    ]


def rounded_up(value: float) -> float:
    """To two digits, and not less."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.6g}")


def newest_evaluated(runs: Path, *, like: Path) -> Path | None:
    """The folder of the run that was evaluated last before the result `like`, on the same questions and judged in the same way:
    `finetune compare` refuses any other."""
    found = [path for path in runs.glob("*/eval.json") if path != like and path.with_name("config.yaml").is_file()]
    found = [path for path in found if _alike(path, like) and _written(path) <= _written(like)]
    newest = max(found, key=_written, default=None)
    return newest.parent if newest else None


def _written(result: Path) -> float:
    return result.stat().st_mtime


def _alike(first: Path, second: Path) -> bool:
    same, (one, other) = _questions(first), (_judging(first), _judging(second))
    return same is not None and same == _questions(second) and all(one[key] == other[key] for key in one.keys() & other)


def _questions(result: Path) -> tuple[Any, ...] | None:
    """The SHA-256 of the data's manifest, the split, and the number of questions."""
    with suppress(OSError, ValueError, UserError, TypeError, KeyError):
        content = load_json(result)
        return tuple(content[key] for key in ("data_manifest_sha256", "split", "questions"))
    return None


def _judging(result: Path) -> dict[str, Any]:
    """What the verdicts depend on, as far as it is known: report/compared.py has the same for `finetune compare`."""
    with suppress(OSError, ValueError, UserError, AttributeError):
        content = load_json(result)
        known = content.get("judging")
        return known if isinstance(known, dict) else {key: content.get(key) for key in ("rule", "timeout_seconds")}
    return {}


def _without(words: Iterable[str], *options: str) -> list[str]:
    """Without these options and their values."""
    kept, skip = list[str](), False
    for word in words:
        if not skip and word not in options:
            kept.append(word)
        skip = not skip and word in options
    return kept


def _without_evaluation(overrides: Sequence[str]) -> list[str]:
    return [word for word in overrides if not word.startswith("evaluation.")]
