"""`finetune data prepare` and `finetune data check`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_config, add_json, loaded
from finetune.errors import EXIT_MISSING, EXIT_OK, UserError
from finetune.init.form import FORM
from finetune.init.origin import changed_since, in_own_file, own_places
from finetune.project_folder import PAIRS
from finetune.runtime.commands import as_command
from finetune.runtime.console import say, visible
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_check, after_faults, after_prepare
from finetune.stage_end.tell import cost_of_command, finetune, tell

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.data.check import Findings
    from finetune.data.golds import HollowDatabase


def add(commands: Any) -> None:
    data = add_command(
        commands, "data", None, "prepare or check the data set", "finetune data check configs/demo_cpu.yaml"
    )
    data_commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    prepare = add_command(
        data_commands,
        "prepare",
        _data_prepare,
        "validate, de-duplicate, split and write the data set",
        "finetune data prepare configs/demo_cpu.yaml",
    )
    check = add_command(
        data_commands,
        "check",
        _data_check,
        "validate only; lists every rejected record, writes nothing",
        "finetune data check configs/demo_cpu.yaml",
    )
    add_config(prepare)
    add_config(check)
    add_json(prepare, "the counts")
    add_json(check, "what was found")


def _data_prepare(arguments: argparse.Namespace) -> int:
    from finetune.config.schema import GPU_OPTIMIZERS
    from finetune.data.prepare import prepare_data

    config = loaded(arguments)
    _tell_of_changes(arguments.config)
    with _faults_in_own_file(arguments.config):
        prepared = prepare_data(config, _tokenizer_if_installed(config))
    counts = prepared.manifest["counts"]
    if arguments.json:
        print_document({"folder": prepared.folder, "changed": prepared.changed, **prepared.manifest})
    told = {what: count for what, count in counts.items() if count or what != "left_out_by_max_train_records"}
    print(f"{prepared.folder}: {'written' if prepared.changed else 'unchanged'}, "
          + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in told.items()))  # fmt: skip
    following = after_prepare(
        arguments.config,
        arguments.overrides,
        on_gpu_only=config.training.optim in GPU_OPTIMIZERS,
        is_whole=lambda words: _is_whole(arguments.config, words),
    )
    tell("data prepare", cost_of_command(config.budget.usd_per_hour), following)
    return EXIT_OK


def _is_whole(config: Path, overrides: Sequence[str]) -> bool:
    from finetune.config.load import load_config

    try:
        load_config(config, list(overrides))
    except UserError:
        return False
    return True


def _data_check(arguments: argparse.Namespace) -> int:
    from finetune.data.check import check
    from finetune.data.golds import tally
    from finetune.data.limits import limits_of
    from finetune.data.validate import LEFT_OUT

    config = loaded(arguments)
    _tell_of_changes(arguments.config)
    evaluation = config.evaluation
    with _faults_in_own_file(arguments.config):
        findings = check(config.data, timeout_seconds=evaluation.timeout_seconds, limits=limits_of(evaluation))
    hollow, lengths = findings.hollow_databases(), _lengths(config, findings)
    places = own_places(arguments.config.parent)
    if arguments.json:
        document = findings.as_json()
        for found in (*document["rejections"], *document["flags"]):
            found.update({name: in_own_file(found[name], places) for name in ("where", "text")})
        document["problems"] = [in_own_file(problem, places) for problem in document["problems"]]
        print_document(document | {"too_long": lengths})
    else:
        for line in _lines(findings, hollow):
            print(visible(in_own_file(line, places), one_line=True))
        for line in lengths:
            print(line)
    counts = ", ".join(f"{len(findings.records(split))} {split}" for split in findings.splits)
    flagged = Counter(flag.kind for flag in findings.scored_apart())
    apart = f"; scored apart for their gold queries: {tally(flagged)}" if flagged else ""
    rejected = sum(rejection.reason != LEFT_OUT for rejection in findings.rejections)
    left_out = len(findings.rejections) - rejected
    left = f", {left_out} left out" if left_out else ""
    print(f"{arguments.config}: {counts}, {rejected} rejected{left}{apart}")
    faulty = bool(rejected or findings.problems or hollow)
    following = [] if findings.problems else after_check(arguments.config, arguments.overrides, rejected=rejected)
    following = (after_faults(arguments.config) if faulty else []) + following
    tell("data check", cost_of_command(config.budget.usd_per_hour), following)
    return EXIT_MISSING if faulty else EXIT_OK


def _tell_of_changes(config: Path) -> None:
    """A form, say, that was repaired: the project has its pairs as they were taken over."""
    if own := changed_since(config.parent):
        again = finetune("init", config.parent, "--data", own, why="").here()
        say(
            visible(
                f"{own}: has changed since its pairs were taken over; `{as_command(*again.words)}` takes them again"
            )
        )


@contextmanager
def _faults_in_own_file(config: Path) -> Iterator[None]:
    """Faults of a project's pairs are named where the user wrote them."""
    try:
        yield
    except UserError as error:
        form = config.parent / FORM
        if error.code == "data.not_found" and str(error).startswith(f"{PAIRS}:") and form.is_file():
            raise UserError(
                f"{form}: not taken over yet; fill it in, and then type `finetune init . --data {FORM}`",
                code="data.form_not_filled_in",
            ) from None
        error.args = (in_own_file(str(error), own_places(config.parent)),)
        raise


def _lines(findings: Findings, hollow: list[HollowDatabase]) -> list[str]:
    """What is rejected, what stops `prepare`, and the records that are scored apart; the other flags are only counted."""
    from finetune.data.golds import tally

    of_hollow = {database.db_id for database in hollow}
    flags = [flag for flag in findings.flags if flag.db_id not in of_hollow]
    apart = {flag.where for flag in findings.scored_apart()}
    scored = [flag for flag in flags if flag.where in apart]
    trained = Counter(flag.kind for flag in flags if flag.split == "train")
    unscored = Counter(flag.kind for flag in flags if flag.split != "train" and flag.where not in apart)
    counted = [
        f"{what}: {tally(kinds)} (--json lists them)"
        for what, kinds in (
            ("to train on, and used", trained),
            ("held out, and not scored for lack of a database", unscored),
        )
        if kinds
    ]
    return [str(item) for item in (*findings.rejections, *findings.problems, *scored, *counted, *hollow)]


def _lengths(config: RunConfig, findings: Findings) -> list[str]:
    """What is too long for the model. A model that cannot be loaded here, as on a machine without network, is no fault of the
    data."""
    try:
        tokenizer = _tokenizer_if_installed(config)
        if tokenizer is None:
            return []
        from finetune.data.lengths import too_long
        from finetune.models.positions import configured_positions

        return too_long(config, findings.records, tokenizer, configured_positions(config.model))
    except UserError as error:
        print(visible(f"tokens are not counted: {error}", one_line=True), file=sys.stderr)
        return []


def _tokenizer_if_installed(config: RunConfig) -> Any:
    """The model's tokenizer, for token counts; None if the extra `train` is not installed."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        print("transformers is not installed here: tokens are not counted", file=sys.stderr)
        return None
    from finetune.models.load import load_tokenizer

    return load_tokenizer(config.model, alone=Path(config.model.name).is_dir())  # nothing here needs the weights
