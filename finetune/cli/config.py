"""`finetune config`: the resolved config of a run."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, add_config, loaded
from finetune.errors import EXIT_OK


def add(commands: Any) -> None:
    show = add_command(
        commands, "config", _config, "print the resolved config", "finetune config configs/demo_cpu.yaml lora.r=8"
    )
    add_config(show)


def _config(arguments: argparse.Namespace) -> int:
    from finetune.config.load import to_yaml

    print(to_yaml(loaded(arguments)), end="")
    return EXIT_OK
