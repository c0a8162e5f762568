"""One peer of benchmarks.throughput in its own process: loads the model, then runs optimizer steps on request.

Reads JSON lines from stdin ({"go": steps}; the end of the input ends it) and answers each with one on stdout. Whatever the
libraries print goes to stderr. Not meant to be started by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.throughput_recipe import BATCH, Recipe, Texts, make_texts

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "triton", "unsloth")
EXTRA_STEPS = 2
"""Added so that the last requested step is never the trainer's last, in which it would begin to finish."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(BUILDERS))
    parser.add_argument("recipe", help="fields of Recipe as JSON")
    parser.add_argument("settings", help="the variant's settings as JSON")
    arguments = parser.parse_args()
    send = private_stdout()
    with tempfile.TemporaryDirectory(prefix="throughput_") as tempfile.tempdir:
        work(arguments, send)


def work(arguments: argparse.Namespace, send: Callable[[dict[str, Any]], None]) -> None:
    """Serve requests; an error is reported in one line, with its traceback in the log."""
    try:
        serve(arguments.kind, Recipe(**json.loads(arguments.recipe)), json.loads(arguments.settings), send)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".strip().splitlines()
        send({"error": message[0] if len(message) < 2 else f"{message[0]} ... {message[-1]}"})
        sys.exit(1)


def private_stdout() -> Callable[[dict[str, Any]], None]:
    """A function that sends JSON lines to the real stdout. All other output to stdout goes to stderr from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    return send


def receive() -> int | None:
    line = sys.stdin.readline()
    return int(json.loads(line)["go"]) if line.strip() else None


def serve(kind: str, recipe: Recipe, settings: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    begun = time.perf_counter()
    config = json.loads((Path(recipe.model) / "config.json").read_text(encoding="utf-8"))
    longest = min(recipe.longest, int(config["max_position_embeddings"]))
    texts = make_texts(
        (recipe.steps + EXTRA_STEPS) * BATCH, int(config["vocab_size"]), longest, recipe.seed, recipe.median
    )
    trainer, how = BUILDERS[kind](recipe, settings, texts)

    from benchmarks.throughput_pace import Pace  # after the builder, because Unsloth has to be imported first

    lengths = texts.lengths
    tokens = [sum(lengths[step : step + BATCH]) for step in range(0, len(lengths), BATCH)]
    trainer.args.max_steps = recipe.steps + EXTRA_STEPS
    trainer.add_callback(
        Pace(tokens, send, receive, lambda: environment() | {"how": how, "load_seconds": time.perf_counter() - begun})
    )
    trainer.train()
    raise RuntimeError("the trainer ended before it was requested to")


def _trl(recipe: Recipe, settings: dict[str, Any], texts: Texts) -> tuple[Any, str]:
    from benchmarks.throughput_trl import plain_trainer

    recipe = recipe.with_settings(settings)
    trainer = plain_trainer(recipe, texts)
    checkpointing = "on" if recipe.checkpointing else "off"
    return trainer, f"padded, {recipe.rows} x {BATCH // recipe.rows}, gradient checkpointing {checkpointing}"


def _ours(recipe: Recipe, settings: dict[str, Any], texts: Texts) -> tuple[Any, str]:
    from benchmarks.throughput_ours import our_trainer

    return our_trainer(recipe, settings, texts)


def _unsloth(recipe: Recipe, settings: dict[str, Any], texts: Texts) -> tuple[Any, str]:
    from benchmarks.throughput_unsloth import attention_in_use, how, unsloth_trainer

    recipe = recipe.with_settings(settings)
    trainer = unsloth_trainer(recipe, texts)
    checkpointing = {"unsloth": "Unsloth's", "True": "on", "False": "off"}[str(recipe.checkpointing)]
    return trainer, f"{how(trainer)}, gradient checkpointing {checkpointing}, {attention_in_use()}"


BUILDERS: dict[str, Callable[[Recipe, dict[str, Any], Texts], tuple[Any, str]]] = {
    "trl": _trl,
    "ours": _ours,
    "unsloth": _unsloth,
}


def environment() -> dict[str, Any]:
    """Versions, and the GPU memory that this worker holds between its turns (GiB, without CUDA's own memory)."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gib": properties.total_memory / 2**30,
            "idle_gib": torch.cuda.memory_reserved() / 2**30,
        }
    return found


if __name__ == "__main__":
    main()
