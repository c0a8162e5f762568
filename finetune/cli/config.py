"""`finetune config`: the resolved config of a run."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, add_config, add_json
from finetune.errors import EXIT_OK
from finetune.runtime.document import print_document


def add(commands: Any) -> None:
    show = add_command(
        commands, "config", _config, "print the resolved config", "finetune config configs/demo_cpu.yaml lora.r=8"
    )
    add_config(show)
    add_json(show, "it")


def _config(arguments: argparse.Namespace) -> int:
    from finetune.config.load import load_config, to_dict, to_yaml

    config = load_config(arguments.config, arguments.overrides)
    if arguments.json:
        print_document(to_dict(config))
        return EXIT_OK
    print(to_yaml(config), end="")
    return EXIT_OK
