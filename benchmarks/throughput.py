"""Compares training throughput in tokens per second: plain TRL as the guide configures it, ours, and Unsloth, on one GPU.

    python -m benchmarks.random_model mistral-7b /tmp/mistral --corpus data/built/train.jsonl
    python -m benchmarks.throughput /tmp/mistral --variants trl,ours,unsloth

Every variant is a process that keeps its model loaded. The variants take turns, in an order that rotates each round, and release
their activation memory after each turn. All train the same texts in the same order, 16 per optimizer step, with one recipe.
Throughput is real tokens (prompt and answer, no padding) per second of optimizer steps, including data collation, with a GPU
synchronisation at the end of each step. Warm-up is discarded: the first steps of a variant, in which kernels are compiled
(--warm-up), and the first step of each later turn, in which caches are cold (its memory is reserved before). Output:
OUT/throughput.json, a plot (PNG and SVG), and each worker's log.

Unsloth does not support the newest versions of its dependencies, so it usually needs its own environment: --unsloth-python, or
--unsloth-path for folders that take precedence over this environment's packages. If the package flash_attn is missing, Unsloth
gets the same kernel from torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput_peer import Peer
from benchmarks.throughput_recipe import BATCH, LONGEST, MEDIAN, Recipe
from benchmarks.throughput_report import last_turn, plot, summarise, table
from finetune.config.schema import LoraSection, TrainingSection
from finetune.errors import EXIT_MISSING, EXIT_USER_ERROR, UserError
from finetune.machine.hardware import GROWING_SEGMENTS
from finetune.runtime.console import escape_unprintable
from finetune.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_LATER = 1
"""Warm-up steps discarded in each turn but the first."""


@dataclass(frozen=True)
class Variant:
    """kind: which worker; settings: fields of Recipe for trl and unsloth, "section.key" of a config for ours."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


GUIDE: dict[str, Any] = {"rows": 4, "checkpointing": True}
FAST_UNSLOTH: dict[str, Any] = {"rows": BATCH, "checkpointing": False, "lora_dropout": 0.0}
VARIANTS = {
    "trl": Variant("trl", GUIDE),
    "trl_fp16": Variant("trl", GUIDE | {"dtype": "float16"}),
    "trl_d0": Variant("trl", GUIDE | {"lora_dropout": 0.0}),
    "ours": Variant("ours"),
    "ours_d0": Variant("ours", {"lora.lora_dropout": 0.0}),
    "ours_gc": Variant("ours", {"training.gradient_checkpointing": True}),
    "ours_10gib": Variant("ours", {"training.max_memory_gib": 10.0}),
    "ours_fp16": Variant("ours", {"model.torch_dtype": "float16"}),
    "ours_hf": Variant("ours", {"training.kernels": "hf"}),
    "unsloth": Variant("unsloth", FAST_UNSLOTH),
    "unsloth_d05": Variant("unsloth", FAST_UNSLOTH | {"lora_dropout": 0.05}),
    "unsloth_gc": Variant("unsloth", FAST_UNSLOTH | {"checkpointing": "unsloth"}),
    "unsloth_pip": Variant("unsloth", FAST_UNSLOTH | {"flash": False}),
}


def main() -> None:
    escape_unprintable()
    arguments = parse()
    try:
        check(arguments)
        variants = chosen(arguments.variants, arguments.ours, arguments.ours_memory_gib)
        steps = arguments.warm_up + (arguments.rounds - 1) * WARM_UP_LATER + arguments.rounds * arguments.steps
        recipe = make_recipe(arguments, steps)
        peers = [
            Peer(
                name, command(variant, recipe, arguments), environment(variant, arguments), arguments.out,
                late=variant.kind == "ours",
            )
            for name, variant in variants.items()
        ]  # fmt: skip
    except UserError as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    head: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "measured": "real tokens per second of optimizer steps of 16 texts; random weights, random token ids",
        "warm_up_steps_left_out": {"first_turn": arguments.warm_up, "later_turns": WARM_UP_LATER},
        "recipe": asdict(recipe),
        "settings": {name: asdict(variant) for name, variant in variants.items()},
    }
    result = measure(
        peers, arguments.rounds, arguments.steps, arguments.warm_up, arguments.timeout, arguments.out, head
    )
    print(table(result))
    print(*[arguments.out / "throughput.json", *plot(result, arguments.out)], sep="\n")
    if any(row["error"] for row in result["variants"].values()):
        sys.exit(EXIT_MISSING)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder, as benchmarks.random_model writes one")
    parser.add_argument("--variants", default="trl,ours,unsloth", help=f"of {', '.join(VARIANTS)}, and those of --ours")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=JSON",
        help='one more variant of ours, e.g. ours_b4=\'{"training.per_device_train_batch_size": 4}\'',
    )  # fmt: skip
    parser.add_argument(
        "--ours-memory-gib", type=float, metavar="GIB",
        help="training.max_memory_gib of ours; needed with several of them, since none accounts for those loaded later",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps of a turn")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of a variant's first turn that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens; texts drawn longer are cut to this")
    parser.add_argument("--median", type=float, default=MEDIAN, help="tokens of the texts (log-normal lengths)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: float32, not quantised")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for loading, and for each turn")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--unsloth-python", default=sys.executable)
    parser.add_argument(
        "--unsloth-path", default="", help="folders (separated as in PYTHONPATH) with Unsloth's packages"
    )
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1 or arguments.steps < 1:
        raise UserError("--rounds, --steps: expected at least 1", code="cli.bad_value")
    if arguments.warm_up < 0:
        raise UserError("--warm-up: expected 0 or more steps", code="cli.bad_value")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU on this machine; with --device cpu and a tiny model the benchmark runs all the same",
            code="benchmark.no_gpu",
        )


def chosen(names: str, extra: list[str], ours_memory_gib: float | None = None) -> dict[str, Variant]:
    """The variants asked for, in that order, and those of --ours.

    Raises UserError for an unknown name or settings that are no JSON object.
    """
    memory = {} if ours_memory_gib is None else {"training.max_memory_gib": ours_memory_gib}
    known = dict(VARIANTS)
    for text in extra:
        name, _, settings = text.partition("=")
        try:
            known[name] = Variant("ours", dict(json.loads(settings)))
            names += f",{name}"
        except (ValueError, TypeError):
            raise UserError(
                f"--ours {text}: expected NAME=JSON with an object of config keys and values", code="cli.bad_value"
            ) from None
    requested = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in requested if name not in known]
    if unknown or not requested:
        raise UserError(f"--variants {names}: expected names of {', '.join(known)}", code="cli.bad_value")
    return {name: _with_memory(known[name], memory) for name in requested}


def _with_memory(variant: Variant, memory: dict[str, float]) -> Variant:
    return replace(variant, settings=memory | variant.settings) if variant.kind == "ours" else variant


def make_recipe(arguments: argparse.Namespace, steps: int) -> Recipe:
    """The guide's values, which are the defaults of our config. Raises UserError where the model is no folder."""
    if not (arguments.model / "config.json").is_file():
        raise UserError(
            f"{arguments.model}: no config.json in it; make a model with `python -m benchmarks.random_model`",
            code="model.incomplete",
        )
    training, lora, on_gpu = TrainingSection(), LoraSection(), arguments.device == "cuda"
    return Recipe(
        model=str(arguments.model.resolve()), device=arguments.device, steps=steps, seed=arguments.seed,
        dtype="bfloat16" if on_gpu else "float32", load_in_4bit=on_gpu,
        optim=training.optim if on_gpu else "adamw_torch", learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type, warmup_ratio=training.warmup_ratio,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm, lora_r=lora.r,
        lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules=tuple(lora.target_modules),
        longest=arguments.longest,
        median=arguments.median,
    )  # fmt: skip


def command(variant: Variant, recipe: Recipe, arguments: argparse.Namespace) -> list[str]:
    python = arguments.unsloth_python if variant.kind == "unsloth" else sys.executable
    settings = [json.dumps(asdict(recipe)), json.dumps(variant.settings)]
    return [python, "-m", "benchmarks.throughput_worker", variant.kind, *settings]


def environment(variant: Variant, arguments: argparse.Namespace) -> dict[str, str]:
    """This process's environment plus the repository; with Unsloth's folders first for Unsloth, and no GPU for --device cpu.

    Ours uses expandable memory segments like `finetune train`; they are set here because a worker imports torch before it builds
    its trainer. Unsloth sets them itself, and plain TRL uses torch's default.
    """
    paths = [arguments.unsloth_path if variant.kind == "unsloth" else "", os.environ.get("PYTHONPATH", ""), str(ROOT)]
    own = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}
    if arguments.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    memory = GROWING_SEGMENTS if variant.kind == "ours" and "PYTORCH_ALLOC_CONF" not in os.environ else {}
    return memory | dict(os.environ) | own


def measure(
    peers: list[Peer], rounds: int, steps: int, warm_up: int, timeout: float, out: Path, head: dict[str, Any]
) -> dict[str, Any]:
    """Run every peer's turn in every round; write the results so far to OUT after each round. Returns `head` with the results.

    A peer that fails or does not answer within `timeout` seconds is ended and keeps its error; the others continue.
    """
    result = head
    try:
        load(peers, timeout)
        for number in range(rounds):
            left_out = WARM_UP_LATER if number else warm_up
            for peer in rotated(peers, number):
                if peer.error is None:
                    peer.turn(number, steps + left_out, left_out, timeout)
                    print(f"round {number + 1} of {rounds}, {peer.name}: {last_turn(peer)}", flush=True)
            result = head | summarise(peers)
            write_json(out / "throughput.json", result)
    finally:
        for peer in peers:
            peer.end()
    return result


def load(peers: list[Peer], timeout: float) -> None:
    """Load all peers at the same time, and then the late ones one after the other."""
    early = [peer for peer in peers if not peer.late]
    for group in [early, *([peer] for peer in peers if peer.late)]:
        for peer in group:
            peer.start()
        for peer in group:
            peer.load(timeout)
            print(f"{peer.name}: {peer.error or peer.info['how']}", flush=True)


def rotated(peers: list[Peer], number: int) -> list[Peer]:
    """A B C, then B C A, then C A B, so that no peer always runs first."""
    first = number % len(peers)
    return peers[first:] + peers[:first]


if __name__ == "__main__":
    main()
