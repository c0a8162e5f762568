"""`finetune completion`: what a shell needs to complete commands, options and file names."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command
from finetune.errors import EXIT_OK

SHELLS = ("bash", "zsh", "fish")


def add(commands: Any) -> None:
    completion = add_command(
        commands,
        "completion",
        _completion,
        "print the completion script of a shell",
        "finetune completion bash",
    )
    completion.description = (
        'Print the completion script of a shell. In ~/.bashrc or ~/.zshrc: eval "$(finetune completion bash)", or zsh; for fish, '
        "once: finetune completion fish > ~/.config/fish/completions/finetune.fish"
    )
    completion.add_argument("shell", choices=SHELLS)


def _completion(arguments: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["finetune"], shell=arguments.shell))
    return EXIT_OK
