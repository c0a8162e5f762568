"""The command line: the only place that parses arguments and prints results. Heavy modules are imported by the
sub-command that needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli_cloud import add_commands as add_cloud_commands
from finetune.errors import EXIT_MISSING, EXIT_OK, EXIT_TRANSIENT, EXIT_USER_ERROR, UserError
from finetune.runtime.console import not_encoded, one_line, print_anything, typed_text

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig

OVERRIDES = "key=value pairs that override the config, such as training.num_train_epochs=1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 something is missing, 2 the user's mistake, 75 interrupted."""
    print_anything()
    parsed = _parse(arguments)
    _quiet_libraries()
    try:
        code: int = parsed.command(parsed)
        sys.stdout.flush()  # here, where a reader that has gone is caught
        return code
    except UserError as error:
        print(f"finetune: {one_line(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UnicodeEncodeError as error:
        print(f"finetune: {not_encoded(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("finetune: interrupted", file=sys.stderr)
        return EXIT_TRANSIENT
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """KEY=VALUE pairs may also come after an option, where argparse alone no longer takes them."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    if hasattr(parsed, "overrides"):  # values for a config, which is UTF-8 everywhere
        try:
            parsed.overrides = [typed_text(word) for word in parsed.overrides]
        except UnicodeDecodeError as error:
            parser.error(f"KEY=VALUE: expected text in UTF-8, found {error.object!r}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a model for text-to-SQL, and measure what it learned.",
        epilog="example:\n  finetune train configs/demo_cpu.yaml\n  finetune evaluate runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = _add(commands, "doctor", _doctor, "check this machine, accounts and packages", "finetune doctor")
    doctor.add_argument(
        "--cloud", action="store_true", help="what launching on Google Cloud needs counts, not what training here needs"
    )

    data = _add(commands, "data", None, "prepare or check the data set", "finetune data check configs/demo_cpu.yaml")
    data_commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    prepare = _add(data_commands, "prepare", _data_prepare, "validate, de-duplicate, split and write the data set",
                   "finetune data prepare configs/demo_cpu.yaml")  # fmt: skip
    check = _add(data_commands, "check", _data_check, "validate only; lists every rejected record, writes nothing",
                 "finetune data check configs/demo_cpu.yaml")  # fmt: skip
    show = _add(
        commands, "config", _config, "print the resolved config", "finetune config configs/demo_cpu.yaml lora.r=8"
    )
    for sub in (prepare, check, show):
        _add_config(sub)

    add_cloud_commands(commands, _add, OVERRIDES)

    train = _add(
        commands, "train", _train, "fine-tune the model of a config",
        "finetune train configs/demo_cpu.yaml training.num_train_epochs=1\n  finetune train --resume runs/demo\n"
        "  finetune train --resume runs/demo --max-run-usd 20",
    )  # fmt: skip
    train.add_argument(
        "--resume", action="store_true", help="go on with the run whose folder is given instead of a config"
    )
    train.add_argument("target", type=Path, metavar="CONFIG|RUN", help="a config file; with --resume a run folder")
    for option, unit, what in (("--max-run-usd", "USD", "dollars"), ("--max-hours", "HOURS", "hours")):
        train.add_argument(
            option,
            metavar=unit,
            help=f"ceiling in {what}, all attempts together: the same as the override budget.{_budget_key(option)}={unit}; with "
            "--resume it is written into config.yaml of the run folder, where it stays",
        )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)

    evaluate = _add(
        commands, "evaluate", _evaluate, "score a run's model and its base model by executing their SQL",
        "finetune evaluate runs/demo\n  finetune evaluate configs/demo_cpu.yaml   (the base model alone)",
    )  # fmt: skip
    evaluate.add_argument(
        "target", type=Path, metavar="RUN|CONFIG", help="a run folder, or a config for the base model"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with a config: " + OVERRIDES)
    evaluate.add_argument("--no-base", action="store_true", help="do not score the base model")

    report = _add(
        commands, "report", _report, "write report.html, report.md and summary.json", "finetune report runs/demo"
    )
    report.add_argument("run", type=Path, metavar="RUN")

    demo = _add(
        commands, "demo", _demo, "score, train, score again and report, in about so many minutes on any machine",
        "finetune demo configs/demo_cpu.yaml --minutes 10",
    )  # fmt: skip
    _add_config(demo)
    demo.add_argument(
        "--minutes",
        type=_minutes,
        default=10.0,
        metavar="N",
        help="how long it may take; the pace of this machine decides what fits (default: 10)",
    )

    generate = _add(commands, "generate", _generate, "answer one question with SQL",
                    'finetune generate runs/demo --db shop.sqlite --run "Which customers ordered twice in May?"')  # fmt: skip
    generate.add_argument("run_folder", type=Path, metavar="RUN")
    generate.add_argument("question", type=_text, metavar="QUESTION")
    generate.add_argument(
        "--db", type=Path, required=True, metavar="FILE", help="a SQLite file, or a schema as .sql file"
    )
    generate.add_argument("--run", action="store_true", help="also run the SQL, read-only, and print the rows")
    generate.add_argument(
        "--evidence", type=_text, metavar="TEXT", help="a hint that the prompt shows with the question"
    )
    generate.add_argument("--base", action="store_true", help="ask the base model instead of the tuned one")
    return parser


def _add(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int] | None, summary: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected minutes, more than 0")
    return minutes


def _text(argument: str) -> str:
    try:
        return typed_text(argument)
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, found {argument!a}") from None


def _quiet_libraries() -> None:
    """What libraries say on their own is rarely for the user; an explicit setting of theirs wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a hub kernel that we do not use
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report its use to the hub


def _doctor(arguments: argparse.Namespace) -> int:
    from finetune.doctor.local import examine, exit_code, render

    checks = examine("cloud", regions=_regions()) if arguments.cloud else examine("train")
    print(render(checks))
    return exit_code(checks)


def _regions() -> list[str] | None:
    """The regions whose quota matters; None, all of them, where the price catalog cannot be read."""
    from finetune.cloud.catalog.offers import load_catalog
    from finetune.cloud.plan.plan import regions_in_question
    from finetune.config.schema import PlanSection

    try:
        return regions_in_question(load_catalog(), PlanSection())
    except UserError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return None


def _config(arguments: argparse.Namespace) -> int:
    from finetune.config.load import to_yaml

    print(to_yaml(_loaded(arguments)), end="")
    return EXIT_OK


def _data_prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.prepare import prepare_data

    config = _loaded(arguments)
    prepared = prepare_data(config, _tokenizer_if_installed(config))
    counts = prepared.manifest["counts"]
    print(f"{prepared.folder}: {'written' if prepared.changed else 'unchanged'}, "
          + ", ".join(f"{count} {split}" for split, count in counts.items()))  # fmt: skip
    return EXIT_OK


def _data_check(arguments: argparse.Namespace) -> int:
    from finetune.data.check import check

    config = _loaded(arguments)
    findings = check(
        config.data.sources,
        max_train_records=config.data.max_train_records,
        timeout_seconds=config.evaluation.timeout_seconds,
        **_split_arguments(config),
    )
    for rejection in findings.rejections:
        print(rejection)
    for problem in findings.problems:
        print(problem)
    counts = ", ".join(f"{len(findings.records(split))} {split}" for split in findings.splits)
    print(f"{arguments.config}: {counts}, {len(findings.rejections)} rejected")
    return EXIT_MISSING if findings.rejections or findings.problems else EXIT_OK


def _split_arguments(config: RunConfig) -> dict[str, Any]:
    return {
        "val_fraction": config.data.val_fraction,
        "test_fraction": config.data.test_fraction,
        "split_by": config.data.split_by,
        "seed": config.data.seed,
    }


def _tokenizer_if_installed(config: RunConfig) -> Any:
    """The model's tokenizer, for token counts; None on a laptop without the extra `train`."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        print("transformers is not installed here: token counts stay unknown", file=sys.stderr)
        return None
    from finetune.models.load import load_tokenizer

    return load_tokenizer(config.model)


@contextmanager
def _large_imports() -> Iterator[None]:
    """Around the import of torch and transformers. A fifth of its CPU time was the search for garbage among half a million
    objects that stay; they are left out of every later search, too."""
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(arguments: argparse.Namespace) -> int:
    from finetune.machine.hardware import let_segments_grow

    let_segments_grow()
    from finetune.runtime import distributed
    from finetune.runtime.console import outliving_readers

    with outliving_readers(), distributed.together():  # so that a fault of all processes is told once
        return _train_here(arguments)


def _budget_key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _typed_ceilings(arguments: argparse.Namespace) -> dict[str, float]:
    """By their keys in the section budget. Raises UserError for what is no number above 0."""
    ceilings = {}
    for option in ("--max-run-usd", "--max-hours"):
        text = getattr(arguments, key := _budget_key(option))
        if text is None:
            continue
        if any(word.startswith(f"budget.{key}=") for word in arguments.overrides):
            raise UserError(f"{option}: is the same as budget.{key}=, which is given too; leave one of them out")
        try:
            ceilings[key] = float(text)
        except ValueError:
            ceilings[key] = math.nan
        if not 0 < ceilings[key] < math.inf:
            raise UserError(f"{option}: expected a number above 0, found {text!r}")
    return ceilings


def _train_here(arguments: argparse.Namespace) -> int:
    ceilings = _typed_ceilings(arguments)
    if arguments.resume:
        if arguments.overrides:
            raise UserError("--resume takes the config in the run folder; overrides would make it another run")
        from finetune.run_folder import open_run

        run = open_run(arguments.target)
        with _large_imports():
            from finetune.training.run import resume

        return resume(run, ceilings)
    arguments.overrides += [f"budget.{key}={value!r}" for key, value in ceilings.items()]
    config = _loaded(arguments, arguments.target)
    with _large_imports():
        from finetune.training.run import start

    return start(config, arguments.target)


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.target.is_dir():
        if arguments.overrides:
            raise UserError("a run is evaluated with the config in its folder; overrides go with a config file")
        from finetune.run_folder import open_run

        run = open_run(arguments.target)
        with _large_imports():
            from finetune.evaluation.run import evaluate_run

        scores = evaluate_run(run, base=not arguments.no_base)["models"]
    else:
        if arguments.no_base:
            raise UserError("--no-base goes with a run folder; a config's base model is all there is to score")
        if not arguments.target.exists():
            raise UserError(f"{arguments.target}: no such run folder or config file")
        config = _loaded(arguments, arguments.target)
        with _large_imports():
            from finetune.evaluation.run import evaluate_base

        scores = {"base": evaluate_base(config)}
    for name, result in scores.items():
        low, high = result["execution_accuracy_interval95"]
        right = f"{result['correct']} of {result['questions']}, 95% interval {low:.1%} to {high:.1%}"
        print(f"{name:>6}: execution accuracy {result['execution_accuracy']:.1%} ({right}), "
              f"valid SQL {result['valid_sql_rate']:.1%}")  # fmt: skip
    return EXIT_OK


def _demo(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    config = _loaded(arguments)
    from finetune.runtime.console import outliving_readers

    with _large_imports():
        from finetune.demo.run import run_demo

    with outliving_readers():
        code = run_demo(config, arguments.config, deadline)
    if code == EXIT_OK:
        _tell_result(Path(config.training.output_dir) / str(config.training.run_name))
    return code


def _report(arguments: argparse.Namespace) -> int:
    _tell_result(arguments.run)
    return EXIT_OK


def _tell_result(folder: Path) -> None:
    """Write a run's report; print its score and where it lies."""
    from finetune.report.render import write_report
    from finetune.report.source import read_run
    from finetune.run_folder import open_run

    run = open_run(folder)
    summary = write_report(run.path)
    before, after = summary["base_execution_accuracy"], summary["tuned_execution_accuracy"]
    if summary["questions"]:
        print(f"execution accuracy: {_percent(before)} before, {_percent(after)} after, on {summary['questions']} "
              f"{read_run(run.path).which_questions}")  # fmt: skip
    else:
        print("execution accuracy: unknown, because the run was not evaluated")
    print(f"report: {run.path / 'report.html'}")


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _generate(arguments: argparse.Namespace) -> int:
    from finetune.run_folder import open_run

    run = open_run(arguments.run_folder)
    from finetune.evaluation.ask import ask, is_schema, run_and_format

    if arguments.run and is_schema(arguments.db):
        raise UserError(f"{arguments.db}: a schema has no rows; give a SQLite file to --db to use --run")
    sql = ask(run, arguments.db, arguments.question, evidence=arguments.evidence, base=arguments.base)
    print(sql)
    if arguments.run:
        print(run_and_format(arguments.db, sql, run.config().evaluation.timeout_seconds))
    return EXIT_OK


def _loaded(arguments: argparse.Namespace, path: Path | None = None) -> RunConfig:
    from finetune.config.load import load_config

    return load_config(path or arguments.config, arguments.overrides)
