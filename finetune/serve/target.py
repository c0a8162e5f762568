"""What is served or asked: a run or an export, with its prompt template and the config that its answers depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate, load_template
from finetune.evaluation.generators.base import LoadedModel
from finetune.evaluation.generators.registry import generator_for
from finetune.models.load import require_adapter
from finetune.run_folder import open_run
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.registry import DEFAULT


@dataclass(frozen=True)
class Target:
    """adapter: of a run, or of an export that is one. gguf: the file of such an export; None for others."""

    name: str
    path: Path
    config: RunConfig
    template: PromptTemplate
    adapter: Path | None
    gguf: Path | None = None

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
        chosen = generator_for(self.config, generator, questions=questions)
        yield chosen.load(self.config, None if base else self.adapter)


def open_target(path: Path) -> Target:
    """Raises UserError if the folder is no run, or its adapter is missing or has changed."""
    run = open_run(path)
    require_adapter(run.adapter)
    return Target(run.path.resolve().name, run.path, run.config(), load_template(run.adapter), run.adapter)
