"""`finetune evaluate`: what it writes, what it caches, and that base and tuned model answer the same questions."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.config.load import load_config, to_yaml
from finetune.data.prepared import load_prepared
from finetune.data.prompts import PromptTemplate
from finetune.evaluation import run as evaluation_run
from finetune.evaluation.generators import hf
from finetune.evaluation.run import evaluate_base, evaluate_run
from finetune.evaluation.score import Row
from finetune.evaluation.statistics import wilson_interval
from finetune.report.questions import questions_data
from finetune.report.render import write_report
from finetune.report.source import read_run
from finetune.run_folder import RunFolder, open_run
from finetune.run_record import DataRecord
from finetune.sql.compare import RULES
from tests.helpers.data_examples import (
    described,
    jsonl_source,
    make_database,
    read_jsonl,
    row,
    run_prepare,
    write_jsonl,
)
from tests.helpers.errors import raises, reported
from tests.helpers.executed import executed
from tests.helpers.run_examples import copy_run, prepare_shop

ConfigWriter = Callable[..., Path]
Answers = Callable[[str], str]


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without progress bars, stderr holds only our own messages."""
    monkeypatch.setattr("transformers.core_model_loading.tqdm", lambda items, **_: items)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return copy_run(tiny_run, tmp_path / "runs")


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch, tiny_data: Path) -> Callable[..., list[str]]:
    """speak(base=..., tuned=...): what the models answer to a gold query, instead of the tiny model's random text.

    Returns a list to which each model that is asked adds its name.
    """
    template = PromptTemplate()
    gold = {template.render_record(record): record.sql for record in load_prepared(tiny_data).records("test")}

    def play(base: Answers = lambda gold: "", tuned: Answers = lambda gold: gold) -> list[str]:
        asked: list[str] = []

        def answer(model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[tuple[str, int]]:
            name = settings["description"].partition(" ")[0]
            asked.append(name)
            return [({"base": base, "tuned": tuned}[name](gold[prompt]), 3) for prompt in prompts]

        monkeypatch.setattr(hf, "generate_answers", answer)
        return asked

    return play


def scored(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


# end to end


def test_train_evaluate_and_report_fit_together(tiny_config: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(training={"max_steps": 2, "run_name": "demo"}, checkpoint={"save_steps": 2})
    assert cli.main(["train", str(config)]) == 0
    run = open_run(config.parent / "runs" / "demo")
    assert cli.main(["evaluate", str(run.path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    base, tuned = (next(line for line in printed if line.startswith(f"{name:>6}: ")) for name in ("base", "tuned"))
    assert all("of 6, 95% interval" in line and "valid SQL" in line for line in (base, tuned))
    assert printed[-1].startswith("  gain: ")

    result = scored(run.eval_json)
    assert (result["split"], result["questions"], result["rule"]) == ("test", 6, "test_suite")
    assert result["without_database"] == 0
    record = run.record()
    assert record.data and result["data_manifest_sha256"] == record.data.manifest_sha256
    assert record.data.dialects == ["sqlite"]
    assert result["prompt_version"] == record.prompt_version
    assert sum(result["gain"].values()) == 6
    for name in ("base", "tuned"):
        scores = result["models"][name]
        rows = [Row(**line) for line in read_jsonl(run.eval_rows(name))]
        assert [row.id for row in rows] == [f"r{n}" for n in range(30, 36)]
        assert scores["questions"] == len(rows) == 6
        assert scores["correct"] == sum(row.verdict == "correct" for row in rows)
        assert scores["execution_accuracy"] == scores["correct"] / 6
        assert scores["execution_accuracy_interval95"] == list(wilson_interval(scores["correct"], 6))
        assert scores["new_tokens"] == sum(row.new_tokens for row in rows) > 0
        assert sum(scores["verdicts"].values()) == 6
        assert scores["rows"] == f"eval/{name}.jsonl"
        assert scores["seconds"] > 0 and scores["dtype"] == "float32"
        assert scores["model"] == load_config(config).model.name
        for key in ("by_difficulty", "by_database"):
            assert sum(group["questions"] for group in scores[key].values()) == 6
    assert result["models"]["base"]["adapter"] is None
    assert result["models"]["tuned"]["adapter"] == str(run.adapter)

    assert cli.main(["report", str(run.path)]) == 0
    summary = scored(run.path / "summary.json")
    assert (summary["status"], summary["questions"]) == ("done", 6)
    assert summary["base_execution_accuracy"] == result["models"]["base"]["execution_accuracy"]
    assert summary["tuned_execution_accuracy"] == result["models"]["tuned"]["execution_accuracy"]
    page = (run.path / "report.md").read_text()
    assert "6 held-out questions with the right rows" in page
    assert "do not add up" not in page and "leaks are possible" not in page and "Asked were" not in page
    assert "on 6 questions that training has not seen" in capsys.readouterr().out


def test_a_model_that_answers_gold_scores_a_hundred_percent(run: RunFolder, speak: Any) -> None:
    speak(base=lambda gold: "Well, that is hard to say.", tuned=lambda gold: f"```sql\n{gold};\n```\nThat is it.")
    result = evaluate_run(run, progress=False)
    base, tuned = result["models"]["base"], result["models"]["tuned"]
    assert (tuned["execution_accuracy"], tuned["correct"], tuned["valid_sql_rate"]) == (1.0, 6, 1.0)
    assert (base["execution_accuracy"], base["valid_sql_rate"]) == (0.0, 0.0)
    assert result["gain"] == {"won": 6, "lost": 0, "both": 0, "neither": 0}
    assert scored(run.eval_json) == json.loads(json.dumps(result))
    summary = write_report(run.path)
    assert (summary["base_execution_accuracy"], summary["tuned_execution_accuracy"]) == (0.0, 1.0)


def test_every_row_holds_the_hash_of_its_exact_prompt(run: RunFolder, speak: Any, tiny_data: Path) -> None:
    speak()
    evaluate_run(run, progress=False)
    records = load_prepared(tiny_data).records("test")
    prompts = [PromptTemplate().render_record(record).encode() for record in records]
    rows = read_jsonl(run.eval_rows("tuned"))
    assert [line["prompt_sha256"] for line in rows] == [hashlib.sha256(prompt).hexdigest() for prompt in prompts]
    assert [line["gold"] for line in rows] == [record.sql for record in records]


def test_the_report_has_the_prompt_and_the_rows_of_every_question(run: RunFolder, speak: Any, tiny_data: Path) -> None:
    speak(base=lambda gold: "SELECT name FROM item WHERE id = -1", tuned=lambda gold: gold)
    evaluate_run(run, progress=False)
    data = questions_data(read_run(run.path))
    records = {record.id: record for record in load_prepared(tiny_data).records("test")}
    assert {one["id"] for one in data["questions"]} == set(records) and len(data["starts"]) == 1
    for one in data["questions"]:
        start, rest = one["prompt"]
        assert data["starts"][start] + rest == PromptTemplate().render_record(records[one["id"]])
        base, tuned = one["answers"]
        assert data["tables"][base["rows"]]["note"] == "no rows"
        assert data["tables"][tuned["rows"]] == data["tables"][one["rows"]] and data["tables"][one["rows"]]["rows"]


def test_a_base_score_of_an_earlier_version_is_judged_again_for_its_rows_and_not_asked(
    run: RunFolder, speak: Any
) -> None:
    speak()
    before = evaluate_run(run, progress=False)["models"]["base"]
    (kept,) = (run.path.parent / "base").iterdir()
    score = scored(kept / evaluation_run.SCORE)
    del score["sampled"]
    (kept / evaluation_run.SCORE).write_text(json.dumps(score))
    lines = read_jsonl(kept / evaluation_run.ROWS)
    for line in lines:
        del line["gold_sample"], line["result_sample"]
    (kept / evaluation_run.ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = speak()
    after = evaluate_run(run, progress=False)["models"]["base"]
    assert asked == [] and after["correct"] == before["correct"] and "sampled" not in after
    assert all(line["gold_sample"] for line in read_jsonl(run.eval_rows("base")))


# base and tuned model answer the same questions


def answers(rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(line["id"], line["answer"], line["new_tokens"]) for line in rows]


@pytest.mark.parametrize("dequantize", [False, True])
def test_the_base_model_under_a_switched_off_adapter_answers_as_it_does_alone(
    tiny_run: Path, tmp_path: Path, dequantize: bool
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", evaluation={"dequantize": dequantize})
    evaluate_run(run, progress=False)
    base = read_jsonl(run.eval_rows("base"))
    tuned = read_jsonl(run.eval_rows("tuned"))
    assert answers(base) != answers(tuned), "an adapter that changes nothing proves nothing"
    shutil.rmtree(run.path.parent / "base")
    evaluate_base(run.config(), progress=False)
    (kept,) = (run.path.parent / "base").iterdir()
    assert answers(read_jsonl(kept / evaluation_run.ROWS)) == answers(base)


def test_without_base_only_the_tuned_model_is_asked(run: RunFolder, speak: Any) -> None:
    asked = speak()
    assert cli.main(["evaluate", str(run.path), "--no-base"]) == 0
    assert asked == ["tuned"]
    result = scored(run.eval_json)
    assert list(result["models"]) == ["tuned"] and result["gain"] is None
    assert write_report(run.path)["base_execution_accuracy"] is None


def test_the_base_models_answers_lie_beside_the_run_wherever_it_was_copied_to(
    tiny_run: Path, tmp_path: Path, speak: Any
) -> None:
    speak()
    run = copy_run(tiny_run, tmp_path / "runs", training={"output_dir": str(tmp_path / "bucket" / "runs")})
    evaluate_run(run, progress=False)
    assert len(list((tmp_path / "runs" / "base").iterdir())) == 1 and not (tmp_path / "bucket").exists()


# every variant for the same answers


def test_the_scores_under_every_rule_are_those_of_an_evaluation_with_that_rule(
    run: RunFolder, speak: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the other evaluations ask no model again."""
    answers_of = {
        "List": lambda gold: gold.replace("SELECT name", "SELECT DISTINCT name") + " LIMIT 9",
        "How": lambda gold: gold.replace(" ORDER BY price DESC", ""),
    }
    asked = speak(base=answers_of["List"], tuned=answers_of["How"])
    assert cli.main(["evaluate", str(run.path)]) == 0
    first = scored(run.eval_json)
    assert asked == ["base", "tuned"] and set(first["gain_by_rule"]) == set(RULES)
    assert first["timeout_seconds"] == 10.0
    seen = set()
    for rule in RULES:
        assert cli.main(["evaluate", str(run.path), f"evaluation.rule={rule}", "evaluation.timeout_seconds=5"]) == 0
        again = scored(run.eval_json)
        assert (again["rule"], again["timeout_seconds"]) == (rule, 5.0)
        assert again["gain"] == first["gain_by_rule"][rule]
        for name, scores in again["models"].items():
            under_rule = first["models"][name]["rules"][rule]
            assert {key: scores[key] for key in under_rule} == under_rule
            assert scores["rules"] == first["models"][name]["rules"]
            assert scores["seconds"] == first["models"][name]["seconds"]
        seen.add(tuple(scores["correct"] for scores in again["models"].values()))
    assert asked == ["base", "tuned"], "no answer was generated again"
    assert len(seen) > 1, "rules that all agree prove nothing"
    assert "of the tuned model" in capsys.readouterr().err


def test_gold_runs_once_for_both_models(run: RunFolder, speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = executed(monkeypatch)
    speak(base=lambda gold: "SELECT 1", tuned=lambda gold: "SELECT 2")
    evaluate_run(run, progress=False)
    golds = [line["gold"] for line in read_jsonl(run.eval_rows("tuned"))]
    assert len(golds) == 6 and [ran.count(gold) for gold in golds] == [1] * 6


def test_hollow_golds_are_scored_apart_printed_and_a_caveat(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", data={"output_dir": str(prepare_shop(tmp_path, items=4))})
    monkeypatch.setattr(hf, "generate_answers", lambda m, t, prompts, **_: [("SELECT 1 WHERE 1 = 0", 3)] * len(prompts))
    assert cli.main(["evaluate", str(run.path)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" tuned: ")]
    assert len(printed) == 1 and printed[0].startswith(" tuned: execution accuracy 50.0%")
    assert printed[0].endswith("; without 1 hollow gold 0.0%")
    scores = scored(run.eval_json)["models"]["tuned"]
    assert scores["by_gold"] == {"no_rows": {"correct": 1, "questions": 1}, "sound": {"correct": 0, "questions": 1}}
    write_report(run.path)
    assert r"1 of 2 (1 no\_rows)" in (run.path / "report.md").read_text()


# which questions


def test_a_sample_is_always_the_same_and_asks_both_models_the_same(run: RunFolder, speak: Any) -> None:
    speak()
    config = run.config()
    chosen = []
    for limit in (2, 4, 4, 6, 100):
        config.evaluation.max_questions = limit
        run.config_yaml.write_text(to_yaml(config))
        result = evaluate_run(run, progress=False)
        base, tuned = ([line["id"] for line in read_jsonl(run.eval_rows(name))] for name in ("base", "tuned"))
        assert base == tuned and len(base) == result["questions"] == min(limit, 6)
        chosen.append(base)
    assert chosen[1] == chosen[2]
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[3]), "a larger sample holds the smaller one"
    assert all(ids == sorted(ids) for ids in chosen), "in the order of the file"
    assert chosen[3] == chosen[4]


def test_another_data_seed_takes_another_sample(
    tiny_config: ConfigWriter, tiny_data: Path, tmp_path: Path, speak: Any
) -> None:
    speak()
    samples = set()
    source = jsonl_source(tiny_data.parent / "records.jsonl", databases=str(tiny_data.parent / "databases"))
    for seed in range(8):
        data = described(run_prepare([source], tmp_path / "prepared", seed=seed).folder)
        config = load_config(tiny_config(data=data, evaluation={"max_questions": 2}))
        evaluate_base(config, progress=False)
    for kept in (Path(config.training.output_dir) / "base").iterdir():
        samples.add(tuple(line["id"] for line in read_jsonl(kept / evaluation_run.ROWS)))
    assert len(samples) > 1


def two_databases(tmp_path: Path) -> Path:
    """A prepared folder whose test split has two records with a database and one without."""
    make_database(tmp_path / "some", items=3)
    with_one = [row(n, split=split) for n, split in enumerate(["train", "val", "test", "test"])]
    without = [row(n, db_id="depot", split=split) for n, split in [(10, "train"), (11, "test")]]
    sources = [
        jsonl_source(write_jsonl(tmp_path / "with.jsonl", with_one), databases=str(tmp_path / "some")),
        jsonl_source(write_jsonl(tmp_path / "without.jsonl", without)),
    ]
    run_prepare(sources, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_records_without_a_database_are_left_out_and_counted(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", data={"output_dir": str(two_databases(tmp_path))})
    monkeypatch.setattr(hf, "generate_answers", lambda m, t, prompts, **_: [("SELECT 1", 3)] * len(prompts))
    result = evaluate_run(run, progress=False)
    assert (result["questions"], result["without_database"]) == (2, 1)
    assert {line["db_id"] for line in read_jsonl(run.eval_rows("tuned"))} == {"shop"}
    assert "1 of 3 test records come without a database and are left out" in capsys.readouterr().err
    record = run.record()
    record.data = DataRecord(counts={"test": 3}, manifest_sha256=result["data_manifest_sha256"])
    run.write_record(record)
    write_report(run.path)
    assert "Only 2 of the 3 questions of the test split were asked" in (run.path / "report.md").read_text()


def test_a_split_without_any_database_is_an_error_before_a_model_is_loaded(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config(data=described(prepare_shop(tmp_path, databases=False))))
    monkeypatch.setattr(hf, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with raises("data.no_database", match=r"no record of the split test comes with a database.*data\.sources"):
        evaluate_base(config, progress=False)


# what is missing, or has changed


def test_a_run_without_adapter_is_an_error_before_a_model_is_loaded(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.adapter)
    monkeypatch.setattr(hf, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with reported("adapter.missing"):
        assert cli.main(["evaluate", str(run.path)]) == 2
    assert capsys.readouterr().err.startswith(f"finetune: {run.adapter}: ")
    assert not run.eval_json.exists()


def test_data_prepared_again_since_training_is_reported_and_becomes_a_caveat(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(copy_run(tiny_run, tmp_path / "runs"), progress=False)
    assert "not the data that" not in capsys.readouterr().err
    run = copy_run(tiny_run, tmp_path / "others", data={"output_dir": str(prepare_shop(tmp_path))})
    evaluate_run(run, progress=False)
    assert "not the data that" in capsys.readouterr().err
    write_report(run.path)
    assert "leaks are possible" in (run.path / "report.md").read_text()


def test_a_database_that_has_changed_since_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", data={"output_dir": str(prepare_shop(tmp_path))})
    file = tmp_path / "prepared" / "databases" / "shop" / "shop.sqlite"
    connection = sqlite3.connect(file)
    connection.execute("DELETE FROM item")
    connection.commit()
    connection.close()
    with reported("data.changed"):
        assert cli.main(["evaluate", str(run.path)]) == 2
    assert f"{file}: " in capsys.readouterr().err


def test_an_evaluation_that_is_cut_off_leaves_the_older_one_whole(run: RunFolder, speak: Any) -> None:
    speak()
    evaluate_run(run, progress=False)
    shutil.rmtree(run.path / "eval" / "answers")
    before = run.eval_json.read_bytes(), run.eval_rows("tuned").read_bytes()

    def stop(gold: str) -> str:
        raise KeyboardInterrupt

    speak(tuned=stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, progress=False)
    assert (run.eval_json.read_bytes(), run.eval_rows("tuned").read_bytes()) == before


# answers that cannot be given whole


def test_a_prompt_that_is_too_long_is_a_verdict_of_its_own_and_counts(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tiny_data: Path
) -> None:
    gold = {PromptTemplate().render_record(r): r.sql for r in load_prepared(tiny_data).records("test")}
    first = next(iter(gold))

    def answer(model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[Any]:
        return [("", 0, "too_long", 34200) if p == first else (f"{gold[p]}; SELECT 2", 3, None, 90) for p in prompts]

    monkeypatch.setattr(hf, "generate_answers", answer)
    result = evaluate_run(run, progress=False)
    tuned, lines = result["models"]["tuned"], read_jsonl(run.eval_rows("tuned"))
    assert (tuned["questions"], tuned["correct"]) == (6, 5)
    assert tuned["verdicts"] == {"correct": 5, "too_long": 1}
    assert (tuned["several_statements"], tuned["longest_prompt"]) == (5, 34200)
    assert [line["several_statements"] for line in lines].count(True) == 5
    assert sorted({line["prompt_tokens"] for line in lines}) == [90, 34200]
    assert result["dialects"] == ["sqlite"]
    write_report(run.path)
    page = (run.path / "report.md").read_text()
    assert "1 of the base model, 1 of the tuned model; these questions count as wrong" in page
    assert "5 of the base model, 5 of the tuned model. Only the first query" in page


def test_memory_that_suffices_for_no_prompt_is_an_error_and_for_one_a_verdict_that_is_asked_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_with(failing: int) -> None:
        def answer(model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[Any]:
            return [("", 0, "out_of_memory", 90)] * failing + [("SELECT 1", 3, None, 90)] * (len(prompts) - failing)

        monkeypatch.setattr(hf, "generate_answers", answer)

    answer_with(6)
    with raises("gpu.out_of_memory", match="one of 90 tokens alone"):
        evaluate_run(run, base=False, progress=False)
    answer_with(1)
    verdicts = evaluate_run(run, base=False, progress=False)["models"]["tuned"]["verdicts"]
    assert verdicts["out_of_memory"] == 1
    answer_with(0)
    verdicts = evaluate_run(run, base=False, progress=False)["models"]["tuned"]["verdicts"]
    assert "out_of_memory" not in verdicts


def test_control_characters_of_answers_are_escapes_in_the_report(run: RunFolder, speak: Any) -> None:
    speak(tuned=lambda gold: "SELECT '\x1b[31m\u202e' AS \"\x07\"")
    evaluate_run(run, progress=False)
    write_report(run.path)
    for name in ("report.md", "report.html"):
        text = (run.path / name).read_text()
        assert not {"\x1b", "\u202e", "\x07"} & set(text) and "x1b" in text
