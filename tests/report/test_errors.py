"""Error classes in the report and on the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.error_classes import ERROR_CLASSES
from finetune.report.errors import LONGEST_EXAMPLE, error_lines, error_rows
from finetune.report.render import write_report
from finetune.report.score_facts import block
from finetune.report.source import read_run
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import build_run, change, rows, write_evaluation

CLASSES = {"no such table: members": "no_such_table", "no such column: model": "column_of_another_table"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "runs" / "demo")


def classified(answered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in answered:
        if row["verdict"] != "correct":
            row["error_class"] = CLASSES.get(
                row["error"], row["verdict"] if row["verdict"] == "no_sql" else "wrong_rows"
            )
    return answered


def evaluated(run: Path, **changes: Any) -> Path:
    base, tuned = (classified(answered) for answered in rows(60))
    write_evaluation(run, base=base, tuned=tuned)
    record = json.loads((run / "eval.json").read_text())
    for name, answered in (("base", base), ("tuned", tuned)):
        found = [row["error_class"] for row in answered if row["verdict"] != "correct"]
        record["models"][name]["error_classes"] = {each: found.count(each) for each in dict.fromkeys(found)} | changes
    change(run / "eval.json", models=record["models"])
    return run


def test_each_class_has_its_count_share_example_and_advice_in_both_reports(run: Path) -> None:
    source = read_run(evaluated(run))
    found = error_rows(source)
    counts = source.tuned["error_classes"]
    assert [row.name for row in found][: len(counts)] == sorted(counts, key=lambda name: -counts[name])
    by_name = {row.name: row for row in found}
    table = by_name["no_such_table"]
    assert table.tuned == f"{counts['no_such_table']} ({counts['no_such_table'] / 60:.1%})"
    assert table.title == ERROR_CLASSES["no_such_table"].title and table.advice == ERROR_CLASSES["no_such_table"].advice
    assert table.example.startswith("SELECT COUNT(*) FROM members") and table.example.endswith(
        "(no such table: members)"
    )
    assert by_name["no_sql"].tuned == "0 (0.0%)" and by_name["no_sql"].base != "0 (0.0%)"
    assert len(by_name["no_sql"].example) < LONGEST_EXAMPLE + 50
    write_report(run)
    for name in ("report.html", "report.md"):
        page = (run / name).read_text()
        assert all(row.advice[:20].replace("`", "") in page.replace("`", "").replace("\\", "") for row in found)


def test_the_console_names_the_three_most_frequent(run: Path) -> None:
    evaluation = json.loads((evaluated(run, timeout=1, crashed=1) / "eval.json").read_text())
    scores = evaluation["models"]["tuned"]
    lines = error_lines(scores)
    head, first, *others = lines
    name, count = max(scores["error_classes"].items(), key=lambda pair: pair[1])
    assert head == "most frequent errors, of 60 answers:" and not any("\n" in line for line in lines)
    assert first == f"  {count} ({count / 60:.1%}) {name}: {ERROR_CLASSES[name].title}"
    assert len(others) == 2 and "crashed" not in "".join(lines)
    assert set(lines) <= set(block(evaluation, "tuned"))
    later = error_lines({"questions": 4, "error_classes": {"of_a_later_version": 1}})
    assert later[1] == "  1 (25.0%) of_a_later_version"
    assert error_lines(scores | {"error_classes": {}}) == [] and error_lines({"questions": 3}) == []


def test_an_evaluation_of_an_earlier_version_has_no_table(run: Path) -> None:
    assert error_rows(read_run(run)) == []
    write_report(run)
    assert "Error classes" not in (run / "report.html").read_text()


@pytest.mark.parametrize("classes", [["wrong_rows"], {"wrong_rows": "3"}, {"wrong_rows": -1}])
def test_classes_that_are_no_counts_are_an_error(run: Path, classes: Any) -> None:
    record = json.loads((run / "eval.json").read_text())
    record["models"]["tuned"]["error_classes"] = classes
    change(run / "eval.json", models=record["models"])
    with raises("report.bad_input", match="error_classes"):
        read_run(run)


def test_a_class_of_a_later_version_is_shown_without_advice(run: Path) -> None:
    found = {row.name: row for row in error_rows(read_run(evaluated(run, new_class=2)))}
    assert (found["new_class"].tuned, found["new_class"].title) == ("2 (3.3%)", "")
