"""The base model's score is cached, and recomputed as soon as anything that it depends on changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.data.prompts import PromptTemplate
from finetune.data.records import Record
from finetune.evaluation import run as evaluation_run
from finetune.evaluation.generators import hf
from finetune.evaluation.judge import Judge, Outcome
from finetune.evaluation.questions import questions_of
from finetune.evaluation.run import evaluate_base, evaluate_run
from finetune.run_folder import RunFolder
from tests.helpers.data_examples import SCHEMA, described, read_jsonl
from tests.helpers.run_examples import copy_run, prepare_shop

ConfigWriter = Callable[..., Path]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were asked, in order. They are fakes that need not be loaded and always answer SELECT 1."""
    names: list[str] = []

    def answer(model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[tuple[str, int]]:
        names.append(settings["description"].partition(" ")[0])
        return [("SELECT 1", 3)] * len(prompts)

    monkeypatch.setattr(hf, "generate_answers", answer)
    for name in ("load_base", "load_adapter", "load_tokenizer"):
        monkeypatch.setattr(hf, name, lambda *_, **__: None)
    return names


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the questions whose answers were judged, in order."""
    ids: list[str] = []
    outcome = Judge.outcome

    def counted(judge: Judge, record: Record, *rest: Any) -> Outcome:
        ids.append(record.id)
        return outcome(judge, record, *rest)

    monkeypatch.setattr(Judge, "outcome", counted)
    return ids


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def only_cached(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs" / "base").iterdir()
    return folder


def verdicts(kept: Path) -> list[str]:
    return [line["verdict"] for line in read_jsonl(kept / evaluation_run.ROWS)]


def test_the_base_models_score_is_cached_for_all_runs_of_its_output_folder(
    tiny_config: ConfigWriter, tiny_run: Path, tmp_path: Path, asked: list[str]
) -> None:
    alone = as_json(evaluate_base(load_config(tiny_config()), progress=False))
    first = copy_run(tiny_run, tmp_path / "runs")
    runs = [first, RunFolder(Path(shutil.copytree(first.path, tmp_path / "runs" / "second")))]
    results = [evaluate_run(run, progress=False) for run in runs]
    assert asked == ["base", "tuned", "tuned"]
    kept = only_cached(tmp_path)
    cached = json.loads((kept / evaluation_run.SCORE).read_text())
    assert (
        cached.pop("judged")
        and cached.pop("sampled")
        and cached == {key: value for key, value in alone.items() if key != "cost"}
    )
    for run, result in zip(runs, results, strict=True):
        assert result["models"]["base"] == alone | {"rows": "eval/base.jsonl"}
        assert read_jsonl(run.eval_rows("base")) == read_jsonl(kept / evaluation_run.ROWS)


@pytest.mark.parametrize(
    ("section", "values", "again"),
    [
        ("evaluation", {"batch_size": 1}, False),
        ("evaluation", {"rule": "strict"}, False),
        ("evaluation", {"timeout_seconds": 1.0}, False),
        ("model", {"max_seq_length": 128}, False),
        ("training", {"learning_rate": 0.5, "seed": 1}, False),
        ("lora", {"r": 2}, False),
        ("evaluation", {"max_new_tokens": 8}, True),
        ("evaluation", {"split": "val"}, True),
        ("evaluation", {"max_questions": 3}, True),
        ("evaluation", {"dequantize": True}, True),
        ("evaluation", {"dtype": "bfloat16"}, True),
        ("evaluation", {"dtype": "float32"}, False),  # what auto comes to
        ("quantization", {"load_in_4bit": False}, True),
        ("quantization", {"bnb_4bit_quant_type": "fp4"}, True),
        ("model", {"torch_dtype": "bfloat16"}, True),
        ("model", {"attn_implementation": "sdpa"}, True),
        ("data", {"schema_format": "compact"}, True),
    ],
)
def test_the_base_model_is_asked_again_when_a_setting_that_matters_changes(
    tiny_config: ConfigWriter, asked: list[str], section: str, values: dict[str, Any], again: bool
) -> None:
    before = evaluate_base(load_config(tiny_config()), progress=False)
    assert evaluate_base(load_config(tiny_config()), progress=False) == as_json(before)
    assert asked == ["base"]
    evaluate_base(load_config(tiny_config(**{section: values})), progress=False)
    assert len(asked) == (2 if again else 1)


def test_a_score_says_in_which_dtype_it_was_answered(tiny_config: ConfigWriter) -> None:
    for dtype in ("float32", "bfloat16"):
        score = evaluate_base(load_config(tiny_config(evaluation={"dtype": dtype})), progress=False)
        assert score["dtype"] == score["generator"]["dtype"] == dtype


def test_another_dtype_of_answers_is_not_judged_otherwise(tiny_config: ConfigWriter) -> None:
    configs = [load_config(tiny_config(evaluation={"dtype": dtype})) for dtype in ("float32", "bfloat16")]
    template = PromptTemplate(configs[0].data.schema_format)
    first, second = (questions_of(config, template).judging_settings() for config in configs)
    assert first == second and "dtype" not in first


def test_other_weights_under_the_same_name_are_scored_again(
    tiny_config: ConfigWriter, tiny_model: Path, tmp_path: Path, asked: list[str]
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = load_config(tiny_config(model={"name": str(folder)}))
    evaluate_base(config, progress=False)
    evaluate_base(config, progress=False)
    assert asked == ["base"]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    evaluate_base(config, progress=False)
    assert asked == ["base", "base"]


@pytest.mark.parametrize("values", [{"rule": "strict"}, {"rule": "test_suite_no_distinct"}, {"timeout_seconds": 1.0}])
def test_another_rule_or_time_limit_judges_the_same_answers_again(
    tiny_config: ConfigWriter, tmp_path: Path, asked: list[str], judged: list[str], values: dict[str, Any]
) -> None:
    evaluate_base(load_config(tiny_config()), progress=False)
    evaluate_base(load_config(tiny_config()), progress=False)
    assert len(judged) == 6
    before = read_jsonl(only_cached(tmp_path) / evaluation_run.ROWS)
    evaluate_base(load_config(tiny_config(evaluation=values)), progress=False)
    assert (len(judged), asked) == (12, ["base"])
    after = read_jsonl(only_cached(tmp_path) / evaluation_run.ROWS)
    assert [line["answer"] for line in after] == [line["answer"] for line in before]
    assert all(line["verdict"] == line["verdicts"][values.get("rule", "test_suite")] for line in after)


def test_another_database_judges_the_same_answers_again(
    tiny_config: ConfigWriter, tmp_path: Path, asked: list[str], judged: list[str]
) -> None:
    config = load_config(tiny_config(data=described(prepare_shop(tmp_path))))
    evaluate_base(config, progress=False)
    prepare_shop(tmp_path, items=4)
    evaluate_base(config, progress=False)
    assert (len(judged), asked) == (4, ["base"])


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": SCHEMA.replace("price REAL", "price NUMERIC")},
        {"evidence": "Items have numbers."},
    ],
)
def test_other_prompts_are_asked_again(
    tiny_config: ConfigWriter, tmp_path: Path, asked: list[str], changes: dict[str, Any]
) -> None:
    config = load_config(tiny_config(data=described(prepare_shop(tmp_path))))
    evaluate_base(config, progress=False)
    evaluate_base(config, progress=False)
    assert len(asked) == 1
    prepare_shop(tmp_path, **changes)
    evaluate_base(config, progress=False)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: (kept / evaluation_run.ROWS).unlink(),
        lambda kept: (kept / evaluation_run.ROWS).write_text('{"id": "r30"}\n'),
        lambda kept: (kept / evaluation_run.ROWS).write_text('{"id": "r3'),
        lambda kept: (kept / evaluation_run.SCORE).unlink(),
        lambda kept: (kept / evaluation_run.SCORE).write_text("{"),
        lambda kept: (kept / evaluation_run.SCORE).write_text("[]"),
        lambda kept: (kept / evaluation_run.SCORE).write_text('{"correct": 1}'),
    ],
)
def test_a_cached_score_that_cannot_be_read_is_computed_from_the_answers(
    tiny_config: ConfigWriter, tmp_path: Path, asked: list[str], judged: list[str], damage: Callable[[Path], None]
) -> None:
    config = load_config(tiny_config())
    before = evaluate_base(config, progress=False)
    rows = verdicts(only_cached(tmp_path))
    damage(only_cached(tmp_path))
    again = evaluate_base(config, progress=False)
    assert (len(asked), len(judged)) == (1, 12)
    assert (again["verdicts"], verdicts(only_cached(tmp_path))) == (before["verdicts"], rows)
