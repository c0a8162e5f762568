"""The data of a report's table of questions, its examples, its machine: from whole files, old ones, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.evaluation.prompt_file import write_prompts
from finetune.machine.price import MachinePrice
from finetune.report.examples import EXAMPLES, examples, kind_of
from finetune.report.machines import capability, machines
from finetune.report.pages import embedded
from finetune.report.questions import MEANING, questions_data
from finetune.report.render import write_report
from finetune.report.samples import cell, sample_table
from finetune.report.source import read_run
from finetune.run_record import RunRecord, read_record
from tests.helpers.data_examples import row
from tests.helpers.errors import raises
from tests.helpers.question_examples import changed_rows, prompt_of, run_with_results
from tests.helpers.report_fixtures import Page, build_run, change, rows, spending


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with_results(tmp_path / "demo", questions=24)


def test_every_question_has_gold_predictions_results_and_its_prompt(run: Path) -> None:
    data, (base, tuned) = questions_data(read_run(run)), rows(24)
    assert data["models"] == ["base", "tuned"] and [one["id"] for one in data["questions"]] == [r["id"] for r in tuned]
    for one, before, after in zip(data["questions"], base, tuned, strict=True):
        assert (one["gold"], one["question"]) == (after["gold"], after["question"])
        assert [answer["verdict"] for answer in one["answers"]] == [before["verdict"], after["verdict"]]
        assert [answer["is_sql"] for answer in one["answers"]] == [bool(before["prediction"]), True]
        assert data["starts"][one["prompt"][0]] + one["prompt"][1] == prompt_of(after)
        assert (one["answers"][1]["rows"] == one["rows"]) == (after["verdict"] == "correct"), "equal ones are kept once"
    assert len(data["starts"]) == 1


def test_answers_of_an_earlier_version_have_no_prompt_and_no_rows(tmp_path: Path) -> None:
    data = questions_data(read_run(build_run(tmp_path / "old", questions=12)))
    assert data["tables"] == data["starts"] == []
    assert all(one["prompt"] is one["rows"] is None for one in data["questions"])


def test_prompts_of_another_evaluation_are_not_shown(run: Path) -> None:
    changed_rows(run, "tuned", lambda number, line: line.update(prompt_sha256="0" * 64))
    changed_rows(run, "base", lambda number, line: line.update(prompt_sha256="0" * 64))
    assert all(one["prompt"] is None for one in questions_data(read_run(run))["questions"])


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": [1], "prompts": {}}', '{"starts": [], "prompts": 3}', "\x00"])
def test_a_damaged_file_of_prompts_is_named(run: Path, text: str) -> None:
    (run / "eval/prompts.json").write_text(text)
    with raises(
        "report.bad_prompts", match=r"eval/prompts\.json: not a file of prompts; run `finetune evaluate .*demo`"
    ):
        write_report(run)


@pytest.mark.parametrize(
    "sample",
    [
        3,
        [],
        {"columns": "a"},
        {"columns": [], "rows": [], "first": -1, "total": 0, "width": 0},
        {"columns": ["a"], "rows": [1]},
    ],
)
def test_what_is_no_sample_is_left_out(run: Path, sample: Any) -> None:
    changed_rows(run, "tuned", lambda number, line: line.update(gold_sample=sample, result_sample=sample))
    write_report(run)
    found = questions_data(read_run(run))["questions"]
    assert all(one["answers"][1]["rows"] is None for one in found)


def test_values_are_told_apart() -> None:
    assert [
        cell(value) for value in (1, "1", 1.5, "x", None, "NULL", "", {"blob": "ff"}, {"number": "inf"}, " 2 ")
    ] == [*("1", "'1'", "1.5", "x", None, "'NULL'", "''", "x'ff'", "inf", "' 2 '")]


def test_a_sample_says_which_rows_it_shows() -> None:
    def note(first: int, shown: int, total: int, width: int = 1) -> str:
        found = sample_table({"columns": ["a"], "rows": [[1]] * shown, "first": first, "total": total, "width": width})
        assert found is not None
        return found.note

    assert [note(0, 0, 0), note(0, 1, 1), note(0, 3, 3)] == ["no rows", "1 row", "3 rows"]
    assert note(0, 10, 1234) == "rows 1 to 10 of 1,234"
    assert note(38, 10, 100, width=20) == "rows 39 to 48 of 100, 1 of 20 columns"


def test_prompts_are_kept_byte_for_byte_and_shared_starts_once(tmp_path: Path) -> None:
    from finetune.data.prompts import PromptTemplate
    from finetune.data.records import Record

    records = [Record(**row(0)), Record(**row(1, evidence="a hint")), Record(**row(2, schema="CREATE TABLE other (a)"))]
    prompts = [PromptTemplate().render_record(record) for record in records] + ["free text", ""]
    records += [Record(**row(3)), Record(**row(4))]
    write_prompts(tmp_path, records, prompts)
    kept = json.loads((tmp_path / "prompts.json").read_text())
    assert [kept["starts"][start] + rest for start, rest in kept["prompts"].values()] == prompts
    assert len(kept["starts"]) == 3, "of two schemas, and none"


def test_examples_have_every_kind_of_error(run: Path) -> None:
    kinds = ("no_such_table", "syntax_error", "wrong_columns", "empty_result", "timeout", "ambiguous_column")
    changed_rows(run, "tuned", lambda number, line: line.update(verdict="sql_error", error_class=kinds[number % 6]))
    changed_rows(run, "base", lambda number, line: line.update(verdict="no_sql", error_class="no_sql"))
    [_, _, wrong] = examples(read_run(run))
    assert wrong.total == 24 and len(wrong.shown) == len(kinds) > EXAMPLES
    assert {answers[2].error_class for _, answers in wrong.shown} == set(kinds)
    assert kind_of([("base", {"verdict": "correct"}), ("tuned", {"verdict": "correct"})]) == ""


def test_every_verdict_has_a_meaning() -> None:
    from finetune.evaluation.error_classes import ERROR_CLASSES

    of_verdicts = ("timeout", "no_sql", "too_large", "forbidden", "crashed", "too_long", "out_of_memory", "failed")
    golds = ("gold_failed", "gold_limit", "gold_unstable")
    assert set(MEANING) == {"correct", "wrong_rows", "sql_error", *of_verdicts, *golds}
    assert {*of_verdicts, *golds} <= set(ERROR_CLASSES)


def test_embedded_data_cannot_end_their_element() -> None:
    text = str(embedded({"</script>": ["<!--", "\u202e", "&amp;", "\ud800", "\u2028"]}))
    assert not set("<>&\u202e\u2028") & set(text)
    assert json.loads(text) == {"</script>": ["<!--", "\\u202e", "&amp;", "\ud800", "\\u2028"]}


# the machine


def test_the_machines_of_all_attempts_are_named_with_their_zones(tmp_path: Path) -> None:
    gpu = {"name": "NVIDIA A100-SXM4-40GB", "memory_gib": 39.4, "compute_capability": [8, 0], "count": 2}
    run = build_run(tmp_path / "cloud", questions=12, **spending())
    record = json.loads((run / "run.json").read_text())
    change(run / "run.json", hardware=record["hardware"] | {"gpu": gpu})
    machine = {"gpu": "L4", "machine": "g2-standard-8", "spot": False, "zone": "us-east4-a"}
    log = Ledger(run / "ledger", "evaluate").new_attempt(
        1, machine=machine, price=MachinePrice(0.7, "x"), resumed_step=None
    )
    log.begin(0.0)
    log.end(10.0, "done", None)
    assert machines(read_record(run / "run.json"), run) == [
        (
            "Trained on",
            "2 x NVIDIA A100-SXM4-40GB, 39.4 GiB (A100, a2-highgpu-1g, spot, us-central1-b; then A100, a2-highgpu-1g, "
            "on-demand, us-central1-b)",
        ),
        ("Scored on", "L4, g2-standard-8, on-demand, us-east4-a"),
    ]
    write_report(run)
    html, markdown = Page((run / "report.html").read_text()).text, (run / "report.md").read_text()
    for text in (html, markdown):
        assert text.count("us-central1-b") >= 2 and text.count("Scored on") >= 1
        assert "[8, 0]" not in text and "8.0" in text, "no raw list"


def test_a_computer_of_ones_own_and_an_unknown_one(tmp_path: Path) -> None:
    run = build_run(tmp_path / "own", questions=12)
    [(label, text)] = machines(read_record(run / "run.json"), run)
    assert label == "Trained on" and text.startswith(
        "AMD EPYC 7B13, 2 cores, 15.6 GiB of memory, no GPU (not a cloud machine"
    )
    assert machines(RunRecord(), tmp_path) == []
    assert capability(None) is None and capability([9, 0]) == "9.0"
