"""The model card of an export says what the score is about, and no more than is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.prompts import load_template
from finetune.export.card import write_card
from finetune.export.model_files import Made, Model
from finetune.run_folder import RunFolder
from finetune.runtime.files import load_json
from tests.helpers.report_fixtures import change
from tests.helpers.run_examples import copy_run

SEEN = "shop"
"""The database of the training data."""
OTHERS = [f"other {number}" for number in range(12)]


def card_of(run: RunFolder) -> str:
    model = Model.of(run, run.config(), load_template(run.adapter))
    return write_card(model, Made("apart", None, {}), "adapter", [], accepted=False)


def limit_of(run: RunFolder) -> str:
    """The first sentence of the limits, which is about the score."""
    return card_of(run).partition("## Limits\n\n- ")[2].partition("\n")[0]


def asked_about(run: RunFolder, names: list[str]) -> None:
    """Let eval.json say that the questions were about these databases."""
    models = load_json(run.eval_json)["models"]
    models["tuned"] |= {
        "by_database": {name: {"correct": 1, "questions": 2} for name in names},
        "execution_accuracy_interval95_by_database": [0.25, 0.75] if len(names) > 1 else None,
    }
    change(run.eval_json, models=models)


@pytest.mark.parametrize(
    ("names", "cell"),
    [
        (OTHERS[:1], "one database: nothing can be said"),
        (OTHERS[:9], "9 databases: too few"),
        (OTHERS[:10], "25.0% to 75.0%"),
    ],
)
def test_the_interval_over_databases_needs_ten_of_them(run: RunFolder, names: list[str], cell: str) -> None:
    asked_about(run, names)
    assert f" | {cell} |\n" in card_of(run)
    limit, quoted = limit_of(run), "for other databases the interval over databases is the one to read"
    assert (quoted in limit) == (len(names) == 10) != ("too few to say it of others" in limit)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([SEEN], "about this database: other questions about it were trained on, so it says nothing about a database"),
        ([SEEN, *OTHERS], "about these 13 databases: other questions about 1 of them were trained on, so it may be too high"),
        (OTHERS, "about these 12 databases; for other databases"),
    ],
)  # fmt: skip
def test_a_database_that_was_trained_on_says_nothing_about_others(run: RunFolder, names: list[str], said: str) -> None:
    asked_about(run, names)
    assert said in limit_of(run)


def test_without_the_training_data_split_by_decides(run: RunFolder) -> None:
    asked_about(run, OTHERS)
    change(run.eval_json, data_manifest_sha256="0" * 64)
    assert "may have been trained on (data.split_by: question), so it says nothing about a database" in limit_of(run)
    config = run.config_yaml.read_text()
    run.config_yaml.write_text(config.replace("split_by: question", "split_by: database"))
    assert run.config_yaml.read_text() != config
    assert limit_of(run).endswith("for other databases the interval over databases is the one to read.")


def test_a_run_that_was_not_scored_promises_nothing(run: RunFolder) -> None:
    run.eval_json.unlink()
    assert limit_of(run).startswith("How well it answers was not measured")


@pytest.mark.parametrize(("in_4bit", "method"), [(True, "QLoRA"), (False, "LoRA")])
def test_only_weights_in_4_bits_make_it_qlora(
    scored_run: RunFolder, tmp_path: Path, in_4bit: bool, method: str
) -> None:
    run = copy_run(scored_run.path, tmp_path, quantization={"load_in_4bit": in_4bit})
    assert f" fine-tuned for text-to-SQL with {method}: " in card_of(run)


def test_the_training_data_are_those_that_were_prepared(scored_run: RunFolder, tmp_path: Path) -> None:
    """Not those of the config, which data.sources=... may have replaced when the data were prepared."""
    run = copy_run(scored_run.path, tmp_path, data={"sources": [{"kind": "jsonl", "path": "others.jsonl"}]})
    assert "training data: records.jsonl (licence: unknown)" in card_of(run)
    change(run.run_json, data=load_json(run.run_json)["data"] | {"manifest_sha256": "0" * 64})
    assert "training data: others.jsonl (licence: unknown)" in card_of(run), "the manifest is not that of the training"
