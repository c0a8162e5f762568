"""The data of a job: copied from the bucket, or prepared on this machine."""

from __future__ import annotations

from pathlib import Path

from finetune.config.load import load_config, to_dict
from finetune.job.cache import DataCache
from finetune.job.programs import call, say
from finetune.job.settings import JobSettings
from finetune.run_folder import RunFolder

BUILT = Path("data") / "built"
BUILDER = Path("data") / "build.py"
"""Creates the sets in BUILT, which are not in git."""


def data_of_config(config_file: Path, overrides: list[str], settings: JobSettings) -> None:
    """For a new run: any prepared set of the config."""
    _lay_out(config_file, overrides, "", settings)


def data_of_run(run: RunFolder, settings: JobSettings) -> None:
    """For a run that has started: the set that it started with. Raises UserError if its record cannot be read."""
    used = run.record().data
    _lay_out(run.config_yaml, [], (used and used.manifest_sha256) or "", settings)


def _lay_out(config_file: Path, overrides: list[str], required: str, settings: JobSettings) -> None:
    config = load_config(config_file, overrides)

    def prepare() -> None:
        say("data: not prepared, neither here nor in the bucket; preparing it on this machine, which is billed time")
        named = str(to_dict(config)["data"]["sources"])
        if f"{BUILT.as_posix()}/" in named and not (BUILT / "train.jsonl").exists():
            call(["python", str(BUILDER)], settings.environment)
        call(["finetune", "data", "prepare", str(config_file), *overrides], settings.environment)

    DataCache(settings.mount / "data", settings.state).lay_out(config, required, prepare)
