"""`finetune export`: a run's model in a form that other programs load."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from finetune.cli.arguments import add_command, large_imports, opened, path, text
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.console import visible
from finetune.stage_end.following import after_export
from finetune.stage_end.tell import cost_of_command, tell

TARGETS = ("merged", "gguf", "adapter", "hub")


def add(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        _export,
        "write a run's model for other programs, and score exactly that",
        "finetune export runs/demo --to merged\n  finetune export runs/demo --to gguf --quantize q8_0,q4_k_m\n"
        "  finetune export runs/demo --to hub --repo USER/NAME --private",
        continues=True,
    )
    export.description = (
        f"{export.description} The export is asked the run's questions again and compared with the run's own answers by an exact "
        "paired test; one that answers significantly worse is refused. An interrupted export goes on where it was."
    )
    export.add_argument("run", type=path, metavar="RUN")
    export.add_argument(
        "--to",
        required=True,
        choices=TARGETS,
        help="merged: safetensors for transformers and vLLM; gguf: for llama.cpp and Ollama; adapter: for PEFT and vLLM's LoRA; "
        "hub: uploads one of these to the Hugging Face hub",
    )
    export.add_argument(
        "--output", type=path, metavar="FOLDER", help="a folder that is not there; without it RUN/exports/<kind>"
    )
    export.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="what is merged into: the de-quantised 4-bit weights that the adapter was trained on, or the original ones",
    )
    export.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of merged weights; else that of training"
    )
    export.add_argument(
        "--quantize",
        type=text,
        default="q8_0,q4_k_m",
        metavar="NAMES",
        help="of GGUF files: q8_0, q4_k_m, f16, bf16, f32",
    )
    export.add_argument("--sample", type=_count, default=200, metavar="N", help="questions of the score (200)")
    export.add_argument(
        "--no-score", action="store_true", help="do not ask the questions again; the model card says so"
    )
    export.add_argument(
        "--accept-loss", action="store_true", help="export also what answers significantly worse than the run"
    )
    export.add_argument("--repo", type=text, metavar="USER/NAME", help="with --to hub")
    export.add_argument("--private", action="store_true", help="with --to hub: create a private repository")
    export.add_argument(
        "--upload", choices=("merged", "adapter", "gguf"), help="with --to hub: what is uploaded (merged)"
    )


def _count(argument: str) -> int:
    if not argument.isdecimal() or not 1 <= int(argument) < 10**9:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {argument[:20]!r}")
    return int(argument)


def _export(arguments: argparse.Namespace) -> int:
    _check(arguments)
    run = opened(arguments.run, data=not arguments.no_score)
    with large_imports():
        from finetune.export.run import Request, default_target, export_run
    kind: Any = (arguments.upload or "merged") if arguments.to == "hub" else arguments.to
    request = Request(
        kind=kind,
        base=arguments.base,
        dtype=arguments.dtype,
        quantizations=tuple(dict.fromkeys(name.strip() for name in arguments.quantize.split(",") if name.strip())),
        sample=None if arguments.no_score else arguments.sample,
        accept_loss=arguments.accept_loss,
    )
    if arguments.to == "hub":
        from finetune.export.hub import check_repository

        check_repository(arguments.repo)
    target: Path = arguments.output or default_target(run, request)
    start = time.monotonic()
    if export_run(run, request, target):
        print(visible(f"{target}: written in {time.monotonic() - start:.0f} s (measured)", one_line=True))
    else:
        print(visible(f"{target}: up to date", one_line=True))
    if arguments.to == "hub":
        from finetune.export.hub import upload

        print(visible(upload(target, arguments.repo, private=arguments.private), one_line=True))
    tell("export", cost_of_command(run.config().budget.usd_per_hour), after_export(target))
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not belong together."""
    hub = arguments.to == "hub"
    if hub and arguments.repo is None:
        raise UserError("--to hub: which repository? Add --repo USER/NAME", code="cli.missing_option")
    for name in ("repo", "private", "upload"):
        if getattr(arguments, name) and not hub:
            raise UserError(f"--{name} needs --to hub", code="cli.conflicting_options")
    if arguments.no_score and arguments.accept_loss:
        raise UserError(
            "--accept-loss needs a score; leave --no-score out, or --accept-loss", code="cli.conflicting_options"
        )
