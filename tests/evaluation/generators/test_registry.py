"""A second answer generator takes one module and one registry entry: `evaluate` then scores its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import FEW_QUESTIONS
from finetune.data.prepared import load_prepared
from finetune.data.prompts import PromptTemplate
from finetune.evaluation.generators import hf, registry
from finetune.evaluation.generators.registry import GENERATORS, generator_for
from finetune.evaluation.run import evaluate_base, evaluate_run
from tests.helpers.data_examples import read_jsonl
from tests.helpers.dict_generator import DictGenerator
from tests.helpers.errors import raises
from tests.helpers.run_examples import copy_run

ConfigWriter = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "load_base", lambda *_, **__: pytest.fail("a model of transformers was loaded"))


@pytest.fixture
def gold(tiny_data: Path) -> dict[str, str]:
    """The gold SQL of the test split by prompt."""
    records = load_prepared(tiny_data, progress=False).records("test")
    return {PromptTemplate().render_record(record): record.sql for record in records}


def test_its_answers_are_scored_for_the_tuned_and_the_base_model(
    tiny_run: Path, tmp_path: Path, gold: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs")
    prompts = list(gold)
    toy = DictGenerator(base={prompts[0]: gold[prompts[0]]}, tuned=gold)
    monkeypatch.setitem(GENERATORS, "dict", toy)
    models = evaluate_run(run, generator="dict", progress=False)["models"]
    assert toy.adapters == [run.adapter]
    assert (models["base"]["correct"], models["tuned"]["correct"]) == (1, len(gold))
    assert models["base"]["verdicts"] == {"correct": 1, "no_sql": len(gold) - 1}
    assert models["tuned"]["dtype"] == "words"
    assert [line["new_tokens"] for line in read_jsonl(run.eval_rows("tuned"))] == [
        len(g.split()) for g in gold.values()
    ]


def test_its_base_score_is_cached_separately_from_other_generators_and_versions(
    tiny_config: ConfigWriter, gold: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, toy, other = load_config(tiny_config()), DictGenerator(base=gold), DictGenerator(base={})
    monkeypatch.setitem(GENERATORS, "dict", toy)
    monkeypatch.setitem(GENERATORS, "other", other)
    monkeypatch.setattr(other, "name", "other")
    for _ in range(2):
        assert evaluate_base(config, generator="dict", progress=False)["execution_accuracy"] == 1.0
        assert evaluate_base(config, generator="other", progress=False)["execution_accuracy"] == 0.0
    assert toy.adapters == other.adapters == [None]  # loaded once, then cached
    monkeypatch.setattr(toy, "version", "2")
    evaluate_base(config, generator="dict", progress=False)
    assert len(toy.adapters) == 2
    with pytest.raises(pytest.fail.Exception, match="transformers"):
        evaluate_base(config, progress=False)


def test_a_name_that_is_not_registered_is_an_error_that_lists_the_known_ones(tiny_config: ConfigWriter) -> None:
    with raises("evaluation.unknown_generator", match=r"no answer generator is called 'tgi'; known: hf, vllm"):
        evaluate_base(load_config(tiny_config()), generator="tgi", progress=False)


# which one `auto` takes


@pytest.mark.parametrize("why", [None, "the moon is in the way"])
def test_auto_takes_vllm_where_nothing_is_against_it_and_says_so(
    tiny_config: ConfigWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str | None
) -> None:
    config = load_config(tiny_config())
    monkeypatch.setattr(registry, "missing", lambda config, auto=False: why if auto else pytest.fail("not for auto"))
    assert generator_for(config).name == ("vllm" if why is None else "hf")
    [line] = capsys.readouterr().err.splitlines()
    assert ("because the moon is in the way" if why else "vllm, which is the fastest") in line
    assert generator_for(config, questions=FEW_QUESTIONS - 1).name == "hf", "loading vLLM takes longer than that"
    assert not capsys.readouterr().err
    assert generator_for(config, questions=FEW_QUESTIONS).name == generator_for(config).name


def test_vllm_where_it_cannot_run_is_an_error_with_the_reason_and_another_way(
    tiny_config: ConfigWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config(evaluation={"generator": "vllm"}))
    with raises("evaluation.no_vllm", match="needs a GPU.*evaluation.generator=hf"):
        evaluate_base(config, progress=False)
    monkeypatch.setattr(registry, "require_vllm", lambda config: None)
    assert generator_for(config).name == "vllm"
    assert generator_for(config, "hf").name == "hf"
