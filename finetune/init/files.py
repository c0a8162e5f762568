"""The files of a new project besides its config and data: task YAMLs, settings of SkyPilot and git, README."""

from __future__ import annotations

from finetune.init.config_text import CONFIG, TASKS, Goal
from finetune.runtime.installed import project_files

SKY = ("train_cheapest", "train_h100", "train_a100", "train_spot", "sweep", "evaluate", "serve")
"""The task YAMLs of a project. The others test an account, or are for one more kind of GPU."""
OURS = ("configs/mistral_7b_qlora.yaml", "configs/mistral_7b_quick.yaml")
"""Configs that the task YAMLs name, where a project has its own."""
SCORE = 'EVALUATE: "1"'
SKYIGNORE = """\
# What `workdir: .` leaves on this computer. While this file is there SkyPilot does not look at .gitignore, so
# data/prepared travels.
/.git
/.venv
/.finetune-init.json
/runs
/comparisons
/wandb
/.env*
__pycache__
"""
GITIGNORE = """\
runs/
comparisons/
wandb/
.env*
data/databases/
data/prepared/
on_machine/*.whl
__pycache__/
"""


def task_files(*, goal: Goal, run_usd: float | None, executable: bool) -> dict[str, str]:
    """The task YAMLs of this program, with the project's config. run_usd: the ceiling of a run, None for that of the YAMLs."""
    root = project_files()
    found = {}
    for stem in SKY:
        name = f"sky/{stem}.yaml"
        text = (root / name).read_text(encoding="utf-8")
        for config in OURS:
            text = text.replace(config, CONFIG)
        if run_usd is not None and name in (TASKS[goal], "sky/train_spot.yaml"):
            text = text.replace('MAX_RUN_USD: "25" ', f'MAX_RUN_USD: "{run_usd:g}" ')
        if not executable:
            text = text.replace(f"{SCORE}  ", 'EVALUATE: "0"  ')
        found[name] = text
    return found


def settings_files() -> dict[str, str]:
    return {
        ".sky.yaml": (project_files() / ".sky.yaml").read_text(encoding="utf-8"),
        ".skyignore": SKYIGNORE,
        ".gitignore": GITIGNORE,
    }


def readme(name: str, goal: Goal, *, described: str, commands: list[str], own_data: bool) -> str:
    """Ten lines or so. own_data: whether questions and databases are in the project."""
    data = "`data/`: questions with their SQL, and the databases." if own_data else "The data stay where they are."
    listed = "\n".join(f"    {command}" for command in commands)
    return f"""\
# {name}: a text-to-SQL model of its own

Made by `finetune init`. {described}

{listed}

- `{CONFIG}`: the run; every value says why. `sky/`: tasks for SkyPilot, `{TASKS[goal]}` for this goal (--goal {goal}).
- {data} `on_machine/`: what a cloud machine runs; after an upgrade
  `finetune launch` renews it.
- Stuck? `finetune doctor --cloud`, `finetune data check {CONFIG}`, and `--help` of each command.
"""
