"""What tests share that train or ask a model: a tiny random model, a tiny prepared data set, and configs over both."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.data_examples import described, jsonl_source, make_database, row, run_prepare, write_jsonl

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is slower on more; subprocesses inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a job in a shell's background has it, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

ConfigWriter = Callable[..., Path]

TEMPLATES = [
    ("Which item has number {n}?", "SELECT name FROM item WHERE id = {n}"),
    ("How many items cost more than {n} euros?", "SELECT COUNT(*) FROM item WHERE price > {n}"),
    ("List the names of all items dearer than {n}, the dearest first.",
     "SELECT name FROM item WHERE price > {n} ORDER BY price DESC"),
]  # fmt: skip


LONGEST = (
    *(
        "docs/test_tutorials",
        "docs/test_notebook",
        "training/test_distributed",
        "cloud/launch/test_sky_tasks",
        "runtime/test_terminal",
        "cloud/catalog/test_offers_skypilot",
    ),
    *(
        "training/test_tracking",
        "training/test_stop",
        "training/test_record",
        "test_chaos",
        "cloud/launch/test_policy_more",
    ),
    *(
        "cloud/launch/test_policy_ceiling",
        "cloud/launch/test_policy",
        "cloud/launch/test_policy_cli",
        "data/test_spider",
    ),
)
"""Test files that begin first, the longest before the others, so that no worker waits for another at the end; the seconds are in
docs/testing.md."""
HERE = Path(__file__).resolve().parent
assert all((HERE / f"{name}.py").is_file() for name in LONGEST), "a file of LONGEST has moved"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first. Tests that share a fixture of their module go to one worker, or each would make it anew."""
    place = {name: number for number, name in enumerate(LONGEST)}
    file = {item: item.path.relative_to(HERE).with_suffix("").as_posix() for item in items}
    items.sort(key=lambda item: place.get(file[item], len(place)))
    for item in items:
        shared = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
        grouped = any(item.iter_markers("xdist_group"))
        if not grouped and any(definitions[-1].scope == "module" for definitions in shared):
            item.add_marker(pytest.mark.xdist_group(file[item]))


def pytest_collection_finish() -> None:
    """The modules that tests have imported stay: no search for garbage, of which every training has one, looks at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, Any]]:
    """36 records about the database `shop`, of three lengths: 24 train, 6 val, 6 test."""
    splits = ["train"] * 24 + ["val"] * 6 + ["test"] * 6
    texts = [[text.format(n=n) for text in TEMPLATES[n % 3]] for n in range(len(splits))]
    return [row(n, question=question, sql=sql, split=splits[n]) for n, (question, sql) in enumerate(texts)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_rows: list[dict[str, Any]]) -> Path:
    """A model folder: random float32 weights of a two-layer Llama, and a tokenizer learned from the records."""
    from benchmarks.random_model import make

    folder = tmp_path_factory.mktemp("tiny") / "model"
    make("tiny", folder, (f"{r['schema']}\n{r['question']}\n{r['sql']}" for r in tiny_rows))
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_model` as a GGUF file of float32."""
    import torch

    from finetune.config.schema import ModelSection, QuantizationSection, RunConfig
    from finetune.export.gguf_file import write_gguf
    from finetune.models.load import load_tokenizer
    from finetune.models.merging import MergedWeights

    section = ModelSection(name=str(tiny_model))
    config = RunConfig(model=section, quantization=QuantizationSection(load_in_4bit=False))
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    weights = MergedWeights.of(config, adapter=None, dtype=torch.float32)
    write_gguf(weights, load_tokenizer(section), {"f32": path}, name="tiny")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_rows: list[dict[str, Any]]) -> Path:
    """A prepared folder with the splits of `tiny_rows`; the database of val and test has 40 items. Never write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    databases = folder / "databases"
    make_database(databases, items=40)
    source = jsonl_source(write_jsonl(folder / "records.jsonl", tiny_rows), databases=str(databases))
    run_prepare([source], folder / "prepared")
    return folder / "prepared"


@pytest.fixture(scope="session")
def write_config(tiny_model: Path, tiny_data: Path) -> ConfigWriter:
    """Call it with a folder and sections for the path of a YAML there over `tiny_model` and `tiny_data`, whose runs go to
    folder/runs: NF4, 4 steps of 4 records, a checkpoint every 2. Other sources are prepared in folder/prepared. Session-wide; in
    a test use `tiny_config`."""

    def write(folder: Path, name: str = "tiny.yaml", **sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_model), "max_seq_length": 256},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "data": described(tiny_data),
            "training": {
                "output_dir": str(folder / "runs"),
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2,
                "optim": "adamw_torch",
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "eval_steps": 0,
            },
            "checkpoint": {"save_steps": 2},
            "tracking": {"wandb": "disabled"},
            "evaluation": {"batch_size": 8, "max_new_tokens": 16},
        }
        if "sources" in sections.get("data", {}):
            values["data"] = {"output_dir": str(folder / "prepared")}
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        path = folder / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_config(write_config: ConfigWriter, tmp_path: Path) -> ConfigWriter:
    """`write_config` for tmp_path: tiny_config(training={"max_steps": 2}, name="b.yaml")."""
    return partial(write_config, tmp_path)


@pytest.fixture(scope="session")
def tiny_run(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: one epoch of 6 steps, a validation loss every 3. Copy it before changing anything."""
    from finetune.cli.main import main

    folder = tmp_path_factory.mktemp("tiny")
    training = {"max_steps": -1, "num_train_epochs": 1, "eval_steps": 3}
    assert main(["train", str(write_config(folder, training=training, budget={"usd_per_hour": 3600.0}))]) == 0
    return folder / "runs" / "tiny-001"


@pytest.fixture
def no_keys(tmp_path: Path) -> Iterator[None]:
    """No W&B key of the person who runs the tests, no price of the machine, no variable that one run leaves for the next."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "FINETUNE_PRICES"]:
        del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no-netrc")
    yield
    os.environ.clear()
    os.environ.update(before)
