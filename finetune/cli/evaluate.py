"""`finetune evaluate`: scores of a run's model and of its base model."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import OVERRIDES, add_command, add_json, large_imports, loaded, opened, path, text
from finetune.errors import EXIT_OK, Interrupted, UserError
from finetune.runtime.console import visible
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_evaluation, after_predictions, after_scored_base
from finetune.stage_end.tell import cost_of_command, tell

if TYPE_CHECKING:
    from finetune.stage_end.tell import Next

EVALUATION_KEYS = "evaluation."


def add(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a run's model and its base model by executing their SQL",
        "finetune evaluate runs/demo\n  finetune evaluate runs/demo evaluation.rule=bird_set   (the same answers, judged again)\n"
        "  finetune evaluate configs/demo_cpu.yaml   (the base model alone)\n"
        "  finetune evaluate configs/demo_cpu.yaml --predictions theirs.sql   (somebody else's answers; no model)",
    )
    evaluate.description = (
        f"{evaluate.description} Answers are kept as they come: an interrupted evaluation goes on where it was, "
        "and one with another rule or time limit only judges again."
    )
    evaluate.add_argument(
        "target", type=path, metavar="RUN|CONFIG", help="a run folder, or a config for the base model"
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"{OVERRIDES}; with a run: keys of the section evaluation only",
    )
    evaluate.add_argument("--no-base", action="store_true", help="do not score the base model")
    evaluate.add_argument(
        "--predictions",
        type=path,
        metavar="FILE",
        help="judge these answers and load no model: one SQL query a line in the order of the split, or JSONL with id and sql",
    )
    add_json(evaluate, "eval.json")
    evaluate.add_argument("--name", type=text, help="of the result of --predictions; without it, that of the file")


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.report.score_facts import block, gain_line

    with _sigterm_as_interrupt():
        result = _result(arguments)
    if arguments.json:
        print_document(result)
    for name in [] if arguments.json else result["models"]:
        first, *rest = block(result, name)
        for line in (f"{name:>6}: {first}", *(f"        {line}" for line in rest)):
            print(visible(line, one_line=True))
    if not arguments.json and (gain := gain_line(result)):
        print(f"  gain: {gain}")
    tell("evaluate", _cost(arguments, result), _following(arguments, result))
    return EXIT_OK


def _cost(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    """Of the answers, which may have been generated earlier and elsewhere, and of this command, which may only have judged."""
    from finetune.report.score_facts import dollars

    here = cost_of_command()
    costs = [scores["cost"] for scores in result["models"].values() if scores.get("cost")]
    whole = result.get("cost") or (costs[0] if len(costs) == 1 else None)
    return f"{here}; all answers: {dollars(whole)}" if whole and whole["usd"] is not None else here


def _following(arguments: argparse.Namespace, result: dict[str, Any]) -> list[Next]:
    from finetune.run_folder import RunFolder

    if arguments.predictions is not None:
        from finetune.evaluation.predictions import place_of

        [name] = result["models"]
        config = loaded(arguments, _config_file(arguments))
        return after_predictions(arguments.target, place_of(arguments.target, config, name).folder, name)
    if arguments.target.is_dir():
        return after_evaluation(RunFolder(arguments.target))
    return after_scored_base(arguments.target, arguments.overrides)


def _result(arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of eval.json, or what there is of it for a base model or for predictions."""
    if arguments.predictions is not None:
        return _of_predictions(arguments)
    if arguments.name is not None:
        raise UserError("--name is that of a result of --predictions FILE", code="cli.conflicting_options")
    return _of_run(arguments) if arguments.target.is_dir() else {"models": {"base": _of_config(arguments)}}


def _of_run(arguments: argparse.Namespace) -> dict[str, Any]:
    _check_overrides(arguments.overrides)
    run = opened(arguments.target)
    evaluation = loaded(arguments, run.config_yaml).evaluation if arguments.overrides else None
    with large_imports():
        from finetune.evaluation.run import evaluate_run

    return evaluate_run(run, base=not arguments.no_base, evaluation=evaluation)


def _check_overrides(overrides: list[str]) -> None:
    """Of a run's config only the section `evaluation` can be overridden: another model or other data would not be those of the
    run."""
    other = [word for word in overrides if not word.startswith(EVALUATION_KEYS)]
    if other:
        raise UserError(
            f"{other[0]}: a run is evaluated with the config in its folder; for a run only the keys {EVALUATION_KEYS}* can be "
            "overridden, for example evaluation.rule=bird_set",
            code="cli.conflicting_options",
        )


def _of_config(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.no_base:
        raise UserError(
            "--no-base needs a run folder; with a config only the base model is scored",
            code="cli.conflicting_options",
        )
    config = loaded(arguments, _config_file(arguments))
    with large_imports():
        from finetune.evaluation.run import evaluate_base

    return evaluate_base(config)


def _of_predictions(arguments: argparse.Namespace) -> dict[str, Any]:
    from finetune.evaluation.predictions import PREDICTIONS, evaluate_predictions

    if arguments.no_base:
        raise UserError("--no-base: with --predictions no model is scored", code="cli.conflicting_options")
    config = loaded(arguments, _config_file(arguments))
    result = evaluate_predictions(arguments.target, config, arguments.predictions, arguments.name, arguments.overrides)
    return {"models": {result[PREDICTIONS]["name"]: result["models"][PREDICTIONS]}}


def _config_file(arguments: argparse.Namespace) -> Path:
    """The config at the target, or of the run there. Raises UserError if there is none, or for keys that a run does not take."""
    if arguments.target.is_dir():
        _check_overrides(arguments.overrides)
        return opened(arguments.target, model=False).config_yaml
    if not arguments.target.exists():
        raise UserError(f"{arguments.target}: no such run folder or config file", code="run.not_found")
    config: Path = arguments.target
    return config


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM ends the command as Ctrl-C does, so that it says what was kept. Further ones are ignored: SkyPilot
    and `timeout` send two."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        told = error if isinstance(error, Interrupted) else Interrupted("nothing was kept", resumable=False)
        if received:
            told.code = 128 + received[0]
        raise told from None
    finally:
        if not received:
            signal.signal(signal.SIGTERM, earlier)
