"""Imports point one way. The table is docs/architecture.md's; a new module fails until it has a place."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"

TRAINING = (
    *(
        "callbacks",
        "flat",
        "padded",
        "paged_state",
        "rng",
        "step_loader",
        "step_plan",
        "stepper",
        "trainer",
        "trl_without_wandb",
        "train_parts",
    ),
    *("stopping", "proof", "snapshots", "spending", "tracking", "run_record"),
    *("train", "train_resume", "train_end"),
)
"""The parts of one run."""

ROWS: tuple[tuple[str, ...], ...] = (
    ("", "cloud", "demo"),  # the packages' own __init__.py
    ("errors",),
    ("files", "hardware", "console", "credentials", "ranks", "torchrun", "faults", "cloud.metadata"),
    ("gpus", "config_schema", "machine_time", "checkpoint_disk"),
    ("config_rules", "checkpoint_manifest"),
    ("config",),
    (
        *("prompts", "memory", "shapes", "speed", "sql", "checkpoint", "ledger", "records", "runs"),
        *("lean_memory", "fit", "batching"),
        *("saver", "meter", "resume_rules"),
        *("cloud.prices", "cloud.catalog_file", "cloud.disks", "cloud.machines"),
        *("cloud.instance", "cloud.gcloud", "cloud.gcloud_ask", "cloud.quota", "cloud.run_size"),
    ),
    (
        *("data", "data_check", "data_sources", "data_split", "data_stats", "data_validate"),
        *("model", "scoring", "memory_table"),
        *("attention", "lean_torch", "lean_kernels", "lean_triton", "lean", "lean_model"),
        *("cloud.plan", "cloud.plan_table", "cloud.plan_write", "cloud.candidates"),
    ),
    (
        *TRAINING,
        *("evaluate", "generate", "ask", "export", "cloud.bucket", "cloud.fresh_catalog", "cloud.policy"),
    ),
    ("report", "report_source", "report_plots", "doctor", "doctor_check", "doctor_cloud"),
    ("cli_cloud", "demo.schedule", "demo.pace", "demo.run"),
    ("cli",),
    ("__main__",),
)
"""A module imports only from the rows above its own. `sql` stands for everything in finetune/sql/."""

NEIGHBOURS = (
    {"data", "data_check", "data_sources", "data_split", "data_stats", "data_validate"},
    {*TRAINING},
    {"attention", "lean_torch", "lean_kernels", "lean_triton", "lean", "lean_model"},
    {"evaluate", "generate", "ask"},
    {"report", "report_source", "report_plots"},
    {"doctor", "doctor_check", "doctor_cloud"},
    {"cloud.prices", "cloud.catalog_file", "cloud.disks", "cloud.machines"},
    {"cloud.gcloud", "cloud.gcloud_ask", "cloud.quota"},
    {"demo.schedule", "demo.pace", "demo.run"},
    {"cloud.policy", "cloud.bucket", "cloud.fresh_catalog"},
    {"cloud.plan", "cloud.plan_table", "cloud.plan_write", "cloud.candidates"},
)
"""Modules of one row that are parts of one thing: they may import each other, without a circle."""

ALSO = {
    *(("prompts", "sql"), ("prompts", "records"), ("memory", "shapes"), ("speed", "memory"), ("speed", "shapes")),
    *(
        ("lean_memory", "memory"),
        ("lean_memory", "shapes"),
        ("fit", "lean_memory"),
        ("fit", "memory"),
        ("fit", "shapes"),
    ),
    ("fit", "speed"),
    *(
        ("saver", "checkpoint"),
        ("meter", "ledger"),
    ),
    *(("checkpoint_disk", "checkpoint_manifest"), ("checkpoint_manifest", "checkpoint_disk")),
}
"""(importer, imported) within one row."""

TRAINING = {
    "model",
    "export",
    "ranks",
    "torchrun",
    "demo.pace",
    "demo.run",
    *NEIGHBOURS[0],
    *NEIGHBOURS[1],
    *NEIGHBOURS[2],
    *NEIGHBOURS[3],
}
"""What runs on a GPU machine, without SkyPilot: of cloud/ it sees `instance` and its questions alone, and cloud/ none of it."""

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tensorboard",
    "wandb",
)
SKY = "sky"


def module_names() -> dict[str, Path]:
    """Dotted name inside finetune -> file; "" is the package itself."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 5
    parts = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in paths}
    return {".".join(part for part in names if part != "__init__"): path for path, names in parts.items()}


MODULES = module_names()


def entry(module: str) -> str:
    """The name under which the table lists a module."""
    return "sql" if module.partition(".")[0] == "sql" else module


def row(module: str) -> int:
    return next((number for number, names in enumerate(ROWS) if entry(module) in names), len(ROWS))


def imported_names(tree: ast.AST, package: str) -> set[str]:
    """Everything that the import statements in the tree name, with what they take from there."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")
                origin = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            names |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return names


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, function-level and TYPE_CHECKING imports included."""
    path = MODULES[module]
    here = ["finetune", *module.split(".")] if module else ["finetune"]
    package = ".".join(here if path.name == "__init__.py" else here[:-1])
    found = set()
    for name in imported_names(ast.parse(path.read_text(encoding="utf-8")), package):
        first, _, rest = name.partition(".")
        while first == "finetune" and rest not in MODULES:  # finetune.sql.schema.compact -> sql.schema
            rest = rest.rpartition(".")[0]
        if first == "finetune" and rest != module:
            found.add(rest)
    return frozenset(found)


def reached(module: str) -> set[str]:
    """All modules of ours that are loaded once everything in `module` has run."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def may_import(importer: str, imported: str) -> bool:
    mine, other = entry(importer), entry(imported)
    neighbours = mine == other == "sql" or any({mine, other} <= group for group in NEIGHBOURS)
    return neighbours or (mine, other) in ALSO or row(imported) < row(importer)


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_has_one_place_in_the_table() -> None:
    listed = [name for names in ROWS for name in names]
    assert len(listed) == len(set(listed))
    unplaced = {entry(module) for module in MODULES} - set(listed)
    assert not unplaced, "give these a row in the table, and in docs/architecture.md"
    assert {name for group in (*NEIGHBOURS, TRAINING, *ALSO) for name in group} <= set(listed)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    wrong = sorted(other for other in imports(module) if not may_import(module, other))
    assert not wrong, f"finetune.{module} may not import these"


def test_no_imports_go_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_training_and_cloud_do_not_know_each_other() -> None:
    for module in MODULES:
        if entry(module) in TRAINING:
            seen = {other for other in reached(module) if other.startswith("cloud.")}
            assert seen <= {"cloud.instance", "cloud.metadata"}, f"finetune.{module} is of training"
        if module.startswith("cloud"):
            assert not reached(module) & TRAINING, f"finetune.{module} is of cloud/"


def test_only_the_policy_imports_skypilot_when_it_is_loaded() -> None:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []  # what a function imports is not loaded with the module
        names = {name.partition(".")[0] for name in imported_names(tree, "finetune")}
        assert SKY not in names or module == "cloud.policy", f"finetune.{module} imports {SKY} at its top level"


def test_the_folder_of_task_files_is_no_package() -> None:
    assert not list((ROOT / "sky").rglob("*.py")), "it would hide SkyPilot's own package `sky`"


def test_a_laptop_needs_nothing_of_training_to_load_what_it_uses() -> None:
    modules = [m for m in MODULES if entry(m) not in TRAINING | {"cloud.policy", "__main__"}]
    imports_ = "; ".join(f"import finetune.{module}" for module in modules if module)
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in (*HEAVY, SKY))
    assert python(f"import sys; {blocked}; {imports_}; print('loaded')") == "loaded"


def test_the_command_line_loads_nothing_heavy_before_it_knows_the_command() -> None:
    heavy = (
        *HEAVY,
        SKY,
        "matplotlib",
        "jinja2",
        "sqlglot",
        "numpy",
        "pandas",
        "omegaconf",
        "yaml",
        "packaging",
    )
    program = f"import sys, finetune.cli; print([name for name in {heavy} if name in sys.modules])"
    assert python(program) == "[]"
