"""`finetune data prepare` and `finetune data check`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_config, loaded
from finetune.errors import EXIT_MISSING, EXIT_OK

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig


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


def _data_prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.prepare import prepare_data

    config = loaded(arguments)
    prepared = prepare_data(config, _tokenizer_if_installed(config))
    counts = prepared.manifest["counts"]
    print(f"{prepared.folder}: {'written' if prepared.changed else 'unchanged'}, "
          + ", ".join(f"{count} {split}" for split, count in counts.items()))  # fmt: skip
    return EXIT_OK


def _data_check(arguments: argparse.Namespace) -> int:
    from finetune.data.check import check
    from finetune.data.golds import tally

    config = loaded(arguments)
    findings = check(config.data, timeout_seconds=config.evaluation.timeout_seconds)
    for rejection in findings.rejections:
        print(rejection)
    for problem in findings.problems:
        print(problem)
    hollow = findings.hollow_databases()
    of_hollow = {database.db_id for database in hollow}
    for flag in findings.flags:
        if flag.db_id not in of_hollow:
            print(flag)
    for database in hollow:
        print(database)
    counts = ", ".join(f"{len(findings.records(split))} {split}" for split in findings.splits)
    flagged = findings.flagged()
    apart = f"; used, but scored apart for their gold queries: {tally(flagged)}" if flagged else ""
    print(f"{arguments.config}: {counts}, {len(findings.rejections)} rejected{apart}")
    return EXIT_MISSING if findings.rejections or findings.problems or hollow else EXIT_OK


def _tokenizer_if_installed(config: RunConfig) -> Any:
    """The model's tokenizer, for token counts; None if the extra `train` is not installed."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        print("transformers is not installed here: tokens are not counted", file=sys.stderr)
        return None
    from finetune.models.load import load_tokenizer

    return load_tokenizer(config.model)
