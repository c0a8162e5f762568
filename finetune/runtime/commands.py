"""Commands inside messages, as one would type them: a name with a space would be two words to the shell."""

from __future__ import annotations

import shlex


def as_command(*words: object) -> str:
    """The words in one line, such as `finetune evaluate 'runs/second try'`."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    """For a shell; in double quotes where single ones in it would make it hard to read."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def evaluate_command(target: object) -> str:
    """The command that scores a run. target: its folder."""
    return as_command("finetune", "evaluate", target)


def resume_command(target: object) -> str:
    """The command that goes on with a run. target: its folder."""
    return as_command("finetune", "train", "--resume", target)


def env_option(name: str, value: str) -> str:
    """The option of `finetune launch` that sets a variable of a task."""
    return as_command("--env", f"{name}={value}")
