"""`finetune export`: writes what ships, scores exactly that, and gives it its name only then.

The order of the stages: check everything that can be checked before work, write the weights, ask the questions again, compare
with the run, write card and manifest, rename. Each stage is kept, so that a killed export goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate, load_template
from finetune.errors import UserError
from finetune.evaluation.generators.base import LoadedModel
from finetune.evaluation.generators.registry import generator_for
from finetune.evaluation.questions import STOPPING_VERSION, adapter_identity, short_hash
from finetune.export.card import write_card
from finetune.export.export_folder import FORMAT, KINDS, Kind, open_export
from finetune.export.model_files import (
    DTYPES,
    Made,
    Model,
    check_tokens,
    write_adapter,
    write_gguf_files,
    write_merged,
)
from finetune.export.part_folder import PartFolder, is_up_to_date
from finetune.export.rescore import SAMPLE, Reference, Score, reference, refuse_loss, score_of
from finetune.models.adapter import check_base
from finetune.models.load import require_adapter
from finetune.models.merging import Base
from finetune.models.source import identity_of_base
from finetune.run_folder import RunFolder, git_state, package_versions
from finetune.runtime.commands import as_command
from finetune.runtime.console import say
from finetune.runtime.files import read_json, write_json, write_text

_MADE = ".made.json"
_PARITY_PROMPTS = 50
"""Prompts whose token ids are compared between transformers and llama.cpp."""


@dataclass(frozen=True)
class Request:
    """What to export. dtype: of merged weights, None for that of training. quantizations: of GGUF files. sample: questions of the
    score; None for no score."""

    kind: Kind
    base: Base = "dequantized"
    dtype: str | None = None
    quantizations: tuple[str, ...] = ("q8_0", "q4_k_m")
    sample: int | None = SAMPLE
    accept_loss: bool = False

    @property
    def name(self) -> str:
        """The folder's name where none is given."""
        return self.kind + ("-original" if self.base == "original" else "")


def default_target(run: RunFolder, request: Request) -> Path:
    return run.path / "exports" / request.name


def export_run(run: RunFolder, request: Request, target: Path, *, progress: bool = True) -> bool:
    """Export a run's model into the folder `target`. Returns whether it was written: not if that same export is there already.

    Raises UserError if the run has no adapter or no score, if the adapter is of another base, if something else is at `target`,
    if the disk is full, and if the export answers significantly worse than the run and that is not accepted. Nothing is then at
    `target`.
    """
    check_request(request)
    require_adapter(run.adapter)
    config, template = run.config(), load_template(run.adapter)
    check_base(run.adapter, identity_of_base(config.model))
    weights_key = _weights_key(run, config, request)
    key = short_hash([weights_key, request.sample])
    if is_up_to_date(target, key):
        return False
    wanted = reference(run, config, template, request.sample) if request.sample else None
    part = PartFolder(target)
    with part.locked():
        say(_announcement(request, config))
        model = Model.of(run, config, template)
        made = _written(part, model, request, weights_key, wanted)
        scores = list(_scores(part, model, made, request, wanted, weights_key, progress))
        for score in scores:
            say(str(score))
        if not request.accept_loss:
            refuse_loss(scores, part.path)
        write_text(part.path / "README.md", write_card(model, made, request.kind, scores, accepted=request.accept_loss))
        part.finish(_manifest(model, made, request, scores, key))
    open_export(target)
    return True


def check_request(request: Request) -> None:
    """Raises UserError for options that exclude each other or are unknown."""
    if request.kind not in KINDS:
        raise UserError(f"--to {request.kind}: expected one of {', '.join(KINDS)}, hub", code="export.bad_option")
    if request.kind == "gguf":
        from finetune.export.gguf_types import FILE_TYPES, check_quantiser

        unknown = [name for name in request.quantizations if name not in FILE_TYPES]
        if unknown or not request.quantizations:
            found = ", ".join(unknown) or "nothing"
            raise UserError(
                f"--quantize: expected some of {', '.join(FILE_TYPES)}, found {found}", code="export.bad_option"
            )
        check_quantiser()
    if request.dtype is not None and (request.kind != "merged" or request.dtype not in DTYPES):
        raise UserError(
            f"--dtype {request.dtype}: for --to merged, one of {', '.join(DTYPES)}", code="export.bad_option"
        )
    if request.kind == "adapter" and request.base == "original":
        raise UserError(
            "--base original: an adapter is not merged into a base; leave --base out", code="export.bad_option"
        )


def _announcement(request: Request, config: RunConfig) -> str:
    if request.kind == "adapter":
        return "export: the adapter, apart from its base model"
    if not config.quantization.load_in_4bit:
        return "export: merged into the base weights, which training did not hold in 4 bits"
    if request.base == "dequantized":
        return (
            "export: merged into the de-quantised 4-bit weights that the adapter was trained on; --base original takes the base "
            "model's own weights"
        )
    return "export: merged into the base model's original weights, which the adapter was not trained on"


def _weights_key(run: RunFolder, config: RunConfig, request: Request) -> str:
    """A hash of all that the exported files depend on."""
    versions = package_versions()
    options: dict[str, Any] = {"base": request.base}
    if request.kind == "merged":
        options["dtype"] = request.dtype
    elif request.kind == "gguf":
        options["quantizations"] = list(request.quantizations)
    return short_hash(
        {
            "format": FORMAT,
            "kind": request.kind,
            **options,
            "adapter": adapter_identity(run.adapter),
            "base_model": identity_of_base(config.model),
            "prompt": load_template(run.adapter).identity(),
            "max_new_tokens": config.evaluation.max_new_tokens,
            "transformers": versions.get("transformers"),
        }
    )


def _written(part: PartFolder, model: Model, request: Request, key: str, wanted: Reference | None) -> Made:
    """The files in the part folder: those of an earlier attempt, or new ones."""
    if part.has(key):
        say(f"{part.path}: the weights of an earlier attempt are there; going on with them")
        kept = read_json(part.path / _MADE, as_command("finetune", "export", model.run.path, "--to", request.kind))
        return Made(kept["base"], kept["dtype"], kept["gguf"])
    made = _make(part.path, model, request)
    for file in made.gguf.values():
        check_tokens(part.path / file, model, _prompts(model.template, wanted))
    write_json(part.path / _MADE, {"base": made.base, "dtype": made.dtype, "gguf": dict(made.gguf)})
    part.keep(key)
    return made


def _make(folder: Path, model: Model, request: Request) -> Made:
    if request.kind == "merged":
        return write_merged(model, folder, base=request.base, dtype=request.dtype)
    if request.kind == "gguf":
        return write_gguf_files(model, folder, base=request.base, quantizations=request.quantizations)
    return write_adapter(model, folder)


def _prompts(template: PromptTemplate, wanted: Reference | None) -> list[str]:
    simple = template.render(
        schema="CREATE TABLE singer (id INTEGER, name TEXT)", question='Who is "Zoë", born in 1987 -- at 12:30?'
    )
    return [simple, *(wanted.questions.prompts[:_PARITY_PROMPTS] if wanted else [])]


def _scores(
    part: PartFolder,
    model: Model,
    made: Made,
    request: Request,
    wanted: Reference | None,
    key: str,
    progress: bool,
) -> Iterator[Score]:
    if wanted is None:
        return
    names = list(made.gguf) or [request.kind]
    for name in names:
        with _loader(part.path, model, made, request, name) as (load, generator):
            yield score_of(
                name,
                wanted,
                part.path / f".answers-{name}.jsonl",
                load,
                generator,
                settings={"weights": key, "name": name, "stopping": STOPPING_VERSION},
                tuned=request.kind == "adapter",
                progress=progress,
            )


@contextmanager
def _loader(
    folder: Path, model: Model, made: Made, request: Request, name: str
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A function that loads the exported model, and what identifies its generator."""
    if request.kind == "gguf":
        from finetune.evaluation.generators.llama_cpp import LlamaCppModel

        file = folder / made.gguf[name]
        with LlamaCppModel(file, model.tokenizer, model.end_ids, limit=model.context_tokens) as served:
            yield (lambda: served), served.facts()
        return
    config = deepcopy(model.config)
    adapter = folder if request.kind == "adapter" else None
    if adapter is None:
        config.model = replace(config.model, name=str(folder), revision=None)
        config.quantization.load_in_4bit = False
    generator = generator_for(config)

    def load() -> LoadedModel:
        return generator.load(config, adapter)

    yield load, {"name": generator.name, "version": generator.version, **generator.settings(config)}


def _manifest(model: Model, made: Made, request: Request, scores: Sequence[Score], key: str) -> dict[str, Any]:
    commit, dirty = git_state()
    section = model.config.model
    local = Path(section.name).exists()
    packages = package_versions()
    return {
        "format": FORMAT,
        "kind": request.kind,
        "key": key,
        "run": model.run.path.resolve().name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": {"name": Path(section.name).name if local else section.name, "revision": section.revision},
        "base": made.base,
        "dtype": made.dtype,
        "gguf": dict(made.gguf),
        "adapter": adapter_identity(model.run.adapter),
        "prompt_version": model.template.identity(),
        "end_ids": model.end_ids,
        "max_new_tokens": model.config.evaluation.max_new_tokens,
        "quantization": asdict(model.config.quantization),
        "context_tokens": model.context_tokens,
        "scores": {score.name: score.as_dict() for score in scores} or None,
        "accepted_loss": request.accept_loss and any(score.lost_significantly for score in scores),
        "git_commit": commit,
        "git_dirty": dirty,
        "packages": {
            name: packages[name] for name in ("torch", "transformers", "peft", "bitsandbytes") if name in packages
        },
    }
