"""What is served: a run or an export, with its prompt template and the section of the config that its answers depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate, load_template
from finetune.models.adapter import check_folder
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
        """Those that it was trained on, the most frequent first."""
        sources = (dialect_name(source.dialect) for source in self.config.data.sources)
        return self.template.dialects or tuple(dict.fromkeys(sources)) or (DEFAULT,)

    def dialect_for(self, own: str | None) -> str:
        """The dialect to ask in about a database with this one."""
        return own if own in self.dialects else self.dialects[0]


def open_target(path: Path) -> Target:
    """Raises UserError if the folder is no run, or its adapter is missing or has changed."""
    run = open_run(path)
    check_folder(run.adapter)
    return Target(run.path.resolve().name, run.path, run.config(), load_template(run.adapter), run.adapter)
