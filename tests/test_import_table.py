"""Imports point one way: a package imports what stands above it in the table, as far as its own row allows.

docs/architecture.md draws the same. A new package fails until it has a row, and a row that nothing needs fails, too.
"""

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

MAY_IMPORT = {
    "errors": "",
    "example": "",
    "tokens": "errors example",
    "runtime": "errors",
    "machine": "errors runtime",
    "checkpoint": "errors runtime",
    "sql": "errors",
    "run_record": "errors runtime",
    "run_name": "",
    "config": "errors runtime machine run_record run_name",
    "models": "errors tokens runtime machine config",
    "models.fused": "example models",
    "run_folder": "errors runtime config run_record run_name",
    "prepared_folder": "",
    "prepared_from": "errors runtime sql config prepared_folder",
    "project_folder": "errors runtime",
    "data": "errors example tokens runtime sql config prepared_folder prepared_from",
    "estimate": "errors runtime machine config models",
    "cloud.catalog": "errors runtime",
    "budget": "errors runtime machine config run_folder cloud.catalog",
    "stage_end": "errors runtime machine run_folder budget project_folder",
    "training.objectives": "errors example tokens",
    "training.step": "errors example runtime machine config models.fused models estimate training.objectives",
    "training": "errors example runtime machine checkpoint config models "
    "run_record run_folder prepared_folder prepared_from data budget training.objectives training.step",
    "sweep": "errors runtime machine config run_name run_record run_folder prepared_folder prepared_from budget stage_end",
    "evaluation": "errors tokens runtime machine sql config run_name models run_folder prepared_folder "
    "prepared_from data budget",
    "job": "errors runtime machine config run_name run_folder prepared_folder prepared_from budget stage_end sweep",
    "cloud.gcloud": "errors runtime",
    "cloud.plan": "errors runtime machine config models prepared_folder prepared_from estimate budget cloud.gcloud "
    "cloud.catalog",
    "cloud.launch": "errors runtime machine config prepared_from project_folder budget sweep job cloud.gcloud "
    "cloud.catalog cloud.plan",
    "report": "errors runtime sql run_record run_name run_folder data budget sweep evaluation",
    "doctor": "errors runtime machine sql cloud.gcloud",
    "export": "errors tokens runtime machine config run_record models run_folder data evaluation",
    "serve.client": "errors runtime",
    "serve": "errors tokens runtime machine sql config models run_folder data evaluation export",
    "init": "errors runtime machine sql config project_folder data evaluation stage_end cloud.catalog cloud.plan "
    "serve.client",
    "demo": "errors tokens runtime config models run_folder data budget training.step training evaluation",
    "cli": "errors runtime machine config models run_folder data estimate budget stage_end training sweep "
    "evaluation project_folder cloud.gcloud cloud.catalog cloud.plan cloud.launch report doctor "
    "export serve.client serve init job demo",
    "__main__": "cli",
}
"""Package or module of finetune/ -> what it may import besides itself. `sql` is all of finetune/sql/; `training` is its files
without those of training/step/ and training/objectives/, which have rows of their own."""

NEEDS_TORCH = (
    "data.tokenize",
    "demo.pace",
    "demo.run",
    "evaluation.ask",
    "evaluation.beyond_greedy",
    "evaluation.generators.decoding",
    "evaluation.generators.hf",
    "evaluation.generators.llama_cpp",
    "evaluation.generators.packed_head",
    "evaluation.generators.passes",
    "evaluation.generators.registry",
    "evaluation.generators.row_cache",
    "evaluation.generators.rows_attention",
    "evaluation.generators.sampling",
    "evaluation.generators.static",
    "evaluation.generators.steps",
    "evaluation.generators.stopping",
    "evaluation.generators.vllm_weights",
    "evaluation.generators.weights",
    "evaluation.run",
    "export.card",
    "export.gguf_file",
    "export.gguf_tokenizer",
    "export.gguf_types",
    "export.model_files",
    "export.run",
    "models.adapter",
    "models.answering",
    "models.attention",
    "models.casts",
    "models.device",
    "models.end_tokens",
    "models.four_bit_files",
    "models.fused",
    "models.gguf",
    "models.head",
    "models.load",
    "models.merging",
    "models.source",
    "models.target_modules",
    "models.weight_files",
    "runtime.torchrun",
    "serve",
    "training",
    "training.objectives",
    "training.step",
)
"""Packages and modules that the extra `train` is for. All others load on a laptop that only plans, launches, prepares data
without token counts, or writes reports."""

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
SKY, WITH_SKY = "sky", ("cloud.launch.policy", "cloud.launch.sky_resources")


def module_files() -> dict[str, Path]:
    """Dotted name inside finetune -> file; without the packages' own __init__.py, which have nothing in them."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert len(paths) > 5
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


MODULES = module_files()


def row(module: str) -> str:
    """The package under which the table lists a module; "" if it does not."""
    while module and module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
    return module


def needs_torch(module: str) -> bool:
    return any(module == name or row(module) == name for name in NEEDS_TORCH)


def imported_names(tree: ast.AST) -> set[str]:
    """Everything that the import statements in the tree name, with what they take from there."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports: whole names are what one searches for"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            names |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return names


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, function-level and TYPE_CHECKING imports included."""
    found = set()
    for name in imported_names(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        first, _, rest = name.partition(".")
        while first == "finetune" and rest and rest not in MODULES:  # finetune.sql.schema.compact -> sql.schema
            rest = rest.rpartition(".")[0]
        assert first != "finetune" or rest, f"finetune.{module} imports {name}, which is no module"
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


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    rows = {module: row(module) for module in MODULES}
    assert not [module for module, name in rows.items() if not name], "give these a row"
    assert set(MAY_IMPORT) == set(rows.values()) - {""}
    assert all(needs_torch(module) == (module in NEEDS_TORCH) or row(module) in NEEDS_TORCH for module in MODULES)
    assert all(name in MODULES or name in MAY_IMPORT for name in NEEDS_TORCH)
    packages = [
        path for path in PACKAGE.rglob("__init__.py") if imported_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not packages, "an __init__.py that imports makes every import of the package heavy"


def test_the_table_allows_imports_from_above_alone() -> None:
    listed = list(MAY_IMPORT)
    for place, (package, allowed) in enumerate(MAY_IMPORT.items()):
        assert set(allowed.split()) <= set(listed[:place]), f"{package} would import from beside or below it"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_what_its_row_says(package: str) -> None:
    inside = [module for module in MODULES if row(module) == package]
    used = {(module, other) for module in inside for other in imports(module) if row(other) not in (package, "")}
    allowed = set(MAY_IMPORT[package].split())
    wrong = sorted(f"{module} -> {other}" for module, other in used if row(other) not in allowed)
    assert not wrong, f"finetune.{package} may not import these"
    assert allowed == {row(other) for _, other in used}, f"finetune.{package} no longer needs all that its row allows"


def test_no_imports_go_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_training_and_cloud_do_not_know_each_other() -> None:
    work = [module for module in MODULES if row(module).split(".")[0] in ("training", "evaluation", "budget")]
    no_sky = {module for module in MODULES if row(module) == "cloud.catalog" and module != "cloud.catalog.refresh"}
    cloud = [module for module in MODULES if row(module).split(".")[0] == "cloud" and module not in no_sky]
    assert work and cloud
    for module in [*work, *filter(needs_torch, MODULES)]:
        assert not reached(module) & set(cloud), f"finetune.{module} runs on a GPU machine, which has no SkyPilot"
    for module in cloud:
        assert not [name for name in reached(module) if needs_torch(name)], f"finetune.{module} runs without torch"


def test_only_the_policy_and_its_resources_import_skypilot_when_they_are_loaded() -> None:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []  # what a function imports is not loaded with the module
        names = {name.partition(".")[0] for name in imported_names(tree)}
        assert SKY not in names or module in WITH_SKY, f"finetune.{module} imports {SKY} at its top level"


def test_the_folder_of_task_files_is_no_package() -> None:
    assert not list((ROOT / "sky").rglob("*.py")), "it would hide SkyPilot's own package `sky`"


def test_a_laptop_needs_nothing_of_training_to_load_what_it_uses() -> None:
    modules = [module for module in MODULES if not needs_torch(module) and module not in (*WITH_SKY, "__main__")]
    imports_ = "; ".join(f"import finetune.{module}" for module in modules)
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
    program = f"import sys, finetune.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert python(program) == "[]"
