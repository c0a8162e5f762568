"""What is served or asked: a run or an export, with its prompt template and the config that its answers depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import ModelSection, QuantizationSection, RunConfig
from finetune.data.prompts import PromptTemplate, load_template
from finetune.errors import UserError
from finetune.evaluation.generators.base import LoadedModel
from finetune.evaluation.generators.registry import generator_for
from finetune.export.export_folder import MANIFEST, Export, is_export, open_export
from finetune.models.adapter import check_folder
from finetune.models.load import require_adapter
from finetune.models.positions import positions
from finetune.run_folder import RunFolder, open_run
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.registry import DEFAULT

if TYPE_CHECKING:
    from finetune.serve.backends.tokens import Vocabulary

CACHED_GGUF = "serve-q8_0"
"""Of the folder below RUN/exports/ with the file that llama.cpp serves of a run."""


@dataclass(frozen=True)
class Target:
    """adapter: of a run, or of an export that keeps it apart. gguf: the file of such an export. run: where it is one."""

    name: str
    path: Path
    config: RunConfig
    template: PromptTemplate
    adapter: Path | None
    gguf: Path | None = None
    run: RunFolder | None = None
    export: Export | None = None

    @property
    def dialects(self) -> tuple[str, ...]:
        """Those that it was trained on, the most frequent first. Runs of earlier versions do not record them; the sources in
        their config say most."""
        sources = (dialect_name(source.dialect) for source in self.config.data.sources)
        return self.template.dialects or tuple(dict.fromkeys(sources))

    def dialect_for(self, own: str | None) -> str:
        """The dialect to ask in about a database with this one."""
        known = self.dialects or (DEFAULT,)
        return own if own in known else known[0]

    @contextmanager
    def loaded(
        self, *, base: bool = False, generator: str | None = None, questions: int | None = 1
    ) -> Iterator[LoadedModel]:
        """The model in memory. base: without the adapter. generator: in place of evaluation.generator. questions: as for
        `generator_for`. Raises UserError like `Generator.load`."""
        with ExitStack() as stack:
            if self.gguf is not None:
                from finetune.evaluation.generators.llama_cpp import LlamaCppModel

                words = self.vocabulary()
                yield stack.enter_context(LlamaCppModel(self.gguf, words.tokenizer, words.ends, limit=words.positions))
                return
            chosen = generator_for(self.config, generator, questions=questions)
            yield chosen.load(self.config, None if base else self.adapter)

    def vocabulary(self) -> Vocabulary:
        """Raises UserError if the tokenizer cannot be loaded."""
        from finetune.models.end_tokens import end_tokens
        from finetune.models.load import load_model_config, load_tokenizer
        from finetune.serve.backends.tokens import Vocabulary

        tokenizer = load_tokenizer(self.config.model, alone=self.gguf is not None)
        if self.export is not None:
            return Vocabulary(tokenizer, list(self.export.end_ids), self.export.context_tokens)
        config = load_model_config(self.config.model)
        return Vocabulary(tokenizer, end_tokens(self.config.model, tokenizer, config), positions(config))

    def gguf_file(self) -> Path:
        """The file for llama.cpp. Of a run it is written into RUN/exports/, in 8 bits, which takes minutes for a large model, and
        used again until the adapter changes. Raises UserError where it cannot be written."""
        if self.gguf is not None:
            return self.gguf
        if self.run is None:
            raise UserError(
                f"--backend llama.cpp: {self.path} is no GGUF file; export the run with --to gguf",
                code="serve.wrong_backend",
            )
        from finetune.export.run import Request, export_run

        folder = self.run.path / "exports" / CACHED_GGUF
        export_run(self.run, Request(kind="gguf", quantizations=("q8_0",), sample=None), folder, progress=False)
        return open_export(folder).model


def open_target(path: Path, *, verify: bool = True) -> Target:
    """verify: compare the hashes of an export, which the server has done before it starts a backend.

    Raises UserError if the folder is neither a run nor an export, if the run's adapter is missing or has changed, and if the
    export is damaged.
    """
    if is_export(path):
        return _of_export(open_export(path, verify=verify))
    try:
        run = open_run(path)
    except UserError as error:
        if error.code != "run.not_found" or not path.is_dir():
            raise
        unfinished = " (an export is unfinished while its folder is called NAME.part)" if path.suffix == ".part" else ""
        raise UserError(f"{error}, and no export (no {MANIFEST}){unfinished}", code="run.not_found") from None
    require_adapter(run.adapter)
    return Target(run.path.resolve().name, run.path, run.config(), load_template(run.adapter), run.adapter, run=run)


def _of_export(export: Export) -> Target:
    name = str(export.manifest["run"] or export.path.resolve().name)
    config = RunConfig()
    config.evaluation.max_new_tokens = export.max_new_tokens
    config.quantization = QuantizationSection(load_in_4bit=False)
    config.model = ModelSection(name=str(export.path.resolve()))
    if export.kind == "adapter":
        settings = check_folder(export.path)
        config.model = ModelSection(name=str(settings["base_model_name_or_path"]), revision=settings.get("revision"))
        config.lora.r, config.lora.lora_alpha = settings["r"], settings["lora_alpha"]
        config.lora.target_modules = list(settings["target_modules"])
        config.quantization = QuantizationSection(**export.manifest["quantization"])
    adapter = export.path if export.kind == "adapter" else None
    gguf = export.model if export.kind == "gguf" else None
    return Target(name, export.path, config, export.template, adapter, gguf, export=export)
