"""The report's input is checked first: a broken eval.json or run.json gives a one-line error, never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.report.render import write_report
from finetune.report.source import read_run
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import Page, build_run, spending, write


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished, evaluated run."""
    return build_run(tmp_path / "demo")


def broken(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for key in path[:-1]:
            record = record[key]
        if value is None:
            del record[path[-1]]
        else:
            record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("models",), [1, 2], "models: expected an object"),
        (("models",), "tuned", "models: expected an object"),
        (("models", "tuned"), 7, "models.tuned is not an object"),
        (("models", "base"), [], "models.base is not an object"),
        (("models", "tuned", "correct"), None, "models.tuned lacks the count correct"),
        (("models", "tuned", "correct"), "50", "models.tuned lacks the count correct"),
        (("models", "tuned", "questions"), -1, "models.tuned lacks the count questions"),
        (("models", "base", "execution_accuracy"), "high", "models.base lacks the number execution_accuracy"),
        (("models", "base", "execution_accuracy_interval95"), [0.1], "execution_accuracy_interval95"),
        (("models", "base", "execution_accuracy_interval95"), 0.1, "execution_accuracy_interval95"),
        (("models", "tuned", "by_difficulty"), [1], "by_difficulty that is not an object"),
        (("models", "tuned", "by_difficulty", "easy"), 3, "by_difficulty object in which easy is not an object"),
        (("models", "tuned", "by_database", "school", "questions"), None, "school lacks the count questions"),
        (("models", "tuned", "verdicts"), [1], "verdicts that are not an object"),
        (("models", "tuned", "verdicts", "correct"), "many", "verdicts object that lacks the count correct"),
        (("models", "tuned", "rows"), "/etc/passwd", "models.tuned.rows: expected a file in the run's folder"),
        (
            ("models", "base", "rows"),
            "../other/eval/base.jsonl",
            "models.base.rows: expected a file in the run's folder",
        ),
        (("models", "base", "rows"), 7, "models.base.rows: expected a file in the run's folder, found '7'"),
        (("gain",), [1, 2], "gain is not an object"),
        (("gain", "neither"), None, "gain lacks the count neither"),
        (("gain", "won"), 1.5, "gain lacks the count won"),
    ],
)
def test_an_evaluation_of_a_broken_shape_is_one_line_and_no_report(
    run_dir: Path, path: tuple[str, ...], value: Any, said: str
) -> None:
    record = json.loads((run_dir / "eval.json").read_text())
    broken(path, value)(record)
    write(run_dir / "eval.json", record)
    with raises("report.bad_input") as caught:
        write_report(run_dir)
    message = str(caught.value)
    assert message.startswith(f"{run_dir / 'eval.json'}: ") and said in message and "\n" not in message
    assert message.endswith(f"; run `finetune evaluate {run_dir}` again")
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("value", ["steps", {"loss": 1}, [1, 2]])
@pytest.mark.parametrize("key", ["history", "attempt_log"])
def test_a_list_of_a_broken_shape_is_one_line(run_dir: Path, key: str, value: Any) -> None:
    write(run_dir / "run.json", {"status": "done", key: value})
    with raises("run.bad_record", match=rf"run\.json: {key}: expected a list of objects$"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({}, "questions that training has not seen"),
        ({"split": "val"}, "questions of the val split"),
        ({"data_manifest_sha256": "0" * 64}, "questions of the test split"),
    ],
)
def test_only_a_test_split_from_the_training_data_counts_as_unseen(
    run_dir: Path, changes: dict[str, Any], which: str
) -> None:
    record = json.loads((run_dir / "eval.json").read_text())
    write(run_dir / "eval.json", record | changes)
    assert read_run(run_dir).which_questions == which


MEMORY = {
    "predicted_peak_gib": 36.45, "predicted_reserved_gib": 37.1, "measured_peak_gib": 36.32, "measured_reserved_gib": 36.45,
}  # fmt: skip


def pages(run_dir: Path) -> tuple[str, str]:
    """The visible text of the HTML report, and the Markdown report."""
    html, markdown = ((run_dir / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return Page(html).text, markdown


def test_estimated_and_measured_memory_stand_side_by_side(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "gpu", memory=MEMORY)
    write_report(run_dir)
    html, markdown = pages(run_dir)
    for what, figures in (
        ("Peak allocated", "36.45 GiB estimated, 36.32 GiB measured (+0.4%)"),
        ("Peak reserved by torch", "37.10 GiB estimated, 36.45 GiB measured (+1.8%)"),
    ):
        assert what in html and figures in html
        assert f"- {what}: {figures}\n" in markdown


@pytest.mark.parametrize("memory", [None, {}, MEMORY | {"predicted_peak_gib": None, "predicted_reserved_gib": None}])
def test_without_both_there_is_no_comparison(memory: Any, tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "cpu", memory=memory)
    write_report(run_dir)
    assert all("Peak allocated" not in text and "GPU memory, estimated" not in text for text in pages(run_dir))


def table(html: str) -> list[list[str]]:
    """The cells of the attempts table."""
    section = html[html.index("Attempts and budget") : html.index("Run record")]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)][1:]


def test_every_attempt_has_a_row_and_the_total_is_shown_with_its_ceiling(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "spot", **spending())
    write_report(run_dir)
    zone = "us-central1-b"
    rows = [
        ["1", "2026-11-21 01:12", "A100, a2-highgpu-1g, spot", zone, "0 to 2310", "3.21", "$1.68", "$5.39", "preempted"],
        ["2", "2026-11-22 02:12", "A100, a2-highgpu-1g, spot", zone, "2280 to 2280", "0.14", "$1.68", "$0.24", "–"],
        ["3", "2026-11-23 03:12", "A100, a2-highgpu-1g, on-demand", zone, "2280 to 2940", "0.92", "$3.78", "$3.48",
         "budget stop"],
    ]  # fmt: skip
    assert table((run_dir / "report.html").read_text(encoding="utf-8")) == rows
    html, markdown = pages(run_dir)
    assert all(f"| {' | '.join(row)} |" in markdown for row in rows)
    for what, figures in (
        ("Dollars", "$9.11 spent, of $10.00 (91%)"),
        ("Hours", "4.27 h spent, no ceiling"),
        ("Projected", "$11.27 for the whole run (estimated)"),
        ("Basis", "hours from boot to the last heartbeat (measured) x catalog price of 2026-11-20"),
    ):
        assert f"{what}{figures}" in re.sub(r"\n", "", html) and f"- {what}: {figures}\n" in markdown


def test_small_dollars_are_no_zeros(tmp_path: Path) -> None:
    usage = {"usd": 0.004, "ceiling_usd": 0.02, "projected_usd": 0.0123}
    run_dir = build_run(
        tmp_path / "cheap", spent_usd=0.004, spending=usage, attempt_log=[{"usd": 0.004, "usd_per_hour": 0.03}]
    )
    write_report(run_dir)
    html, markdown = pages(run_dir)
    assert "| Cost | **$0.004** |" in markdown and "$0.00 " not in html + markdown
    for what, figures in (
        ("Dollars", "$0.004 spent, of $0.02 (20%)"),
        ("Projected", "$0.012 for the whole run (estimated)"),
    ):
        assert f"{what}{figures}" in re.sub(r"\n", "", html) and f"- {what}: {figures}\n" in markdown
    assert table((run_dir / "report.html").read_text(encoding="utf-8"))[0][6:8] == ["$0.03", "$0.004"]


@pytest.mark.parametrize(
    "values", [{}, {"spending": None, "attempt_log": []}, {"spending": {"usd": None, "basis": "none"}}]
)
def test_a_run_that_recorded_no_attempts_has_no_such_section(tmp_path: Path, values: Any) -> None:
    run_dir = build_run(tmp_path / "old", **values)
    write_report(run_dir)
    assert all("Attempts and budget" not in text and "Projected" not in text for text in pages(run_dir))


def test_unknown_values_of_an_attempt_are_dashes(tmp_path: Path) -> None:
    run_dir = build_run(
        tmp_path / "bare", attempt_log=[{"attempt": 1, "hours": float("nan"), "spot": None, "from_step": 0}]
    )
    write_report(run_dir)
    assert table((run_dir / "report.html").read_text()) == [["1", "–", "–", "–", "0 to –", "–", "–", "–", "–"]]
    assert "| 1 | – | – | – | 0 to – | – | – | – | – |" in pages(run_dir)[1]


def test_a_reason_that_contains_markup_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> | *x*"
    run_dir = build_run(
        tmp_path / "evil", attempt_log=[{"attempt": 1, "reason": evil}], spending={"usd": 1.0, "basis": evil}
    )
    write_report(run_dir)
    assert "<script>alert" not in (run_dir / "report.html").read_text()
    html, markdown = pages(run_dir)
    assert html.count(evil) == 2 and "<script>" not in markdown.split("## Run record")[0]
    assert r"\| \*x\* |" in markdown
