"""`finetune report`: its figures match the run, the page works offline, and untrusted text is escaped."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.report import plots as report_plots
from finetune.report import render as report_render
from finetune.report.examples import EXAMPLES, examples
from finetune.report.source import read_run
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import (
    MODEL,
    Page,
    build_run,
    change,
    history,
    rows,
    wilson,
    write,
    write_evaluation,
)

OUTPUTS = ("report.html", "report.md", "summary.json")
EVIL = "<script>alert('x')</script>\n# Heading\n```\n| [link](javascript:x) & \"quotes\""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished, evaluated run, which tests must not change."""
    run_dir = build_run(tmp_path_factory.mktemp("report") / "demo")
    report_render.write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return Page((full / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return build_run(tmp_path / "demo")


def texts(run_dir: Path) -> tuple[str, str]:
    """The visible text of the HTML and the Markdown report."""
    html, markdown = ((run_dir / name).read_text(encoding="utf-8") for name in OUTPUTS[:2])
    return Page(html).text, markdown


def test_summary_holds_exactly_the_agreed_keys_and_the_figures_of_the_run(full: Path) -> None:
    assert json.loads((full / "summary.json").read_text()) == {
        "status": "done",
        "model": MODEL,
        "base_execution_accuracy": 7 / 150,
        "tuned_execution_accuracy": 50 / 150,
        "questions": 150,
        "minutes": 8.39,
        "peak_memory_gib": 2.84,
        "tokens_per_second": 325.7,
        "spent_usd": None,
    }  # fmt: skip


def test_both_reports_open_with_the_result_in_one_sentence(full: Path) -> None:
    sentence = (
        "Answers 50 of 150 held-out questions with the right rows (33.3%, 95% interval 26.3 to 41.2 over questions), "
        "up from 7 (4.7%)."
    )
    html, markdown = texts(full)
    assert sentence in html
    assert f"# demo\n\n**{sentence}**" in markdown


def test_sections_stand_in_the_agreed_order(full: Path) -> None:
    titles = ["Accuracy by group", "What went wrong", "Examples", "How certain is it?", "Run record"]
    for text in texts(full):
        places = [text.index(f"{title}\n") for title in titles]
        assert places == sorted(places)


def test_score_caveats_and_machine_come_before_everything_else(full: Path) -> None:
    for text in texts(full):
        head = text[: text.index("Execution accuracy")]
        assert "Answers 50 of 150" in head and "Few questions: each of the 150" in head
        assert "Trained on AMD EPYC 7B13, 2 cores" in head
        assert text.count("Few questions") == 1, "said once, where the score is"


def test_every_key_figure_says_where_it_comes_from(run_dir: Path) -> None:
    source = read_run(run_dir)
    basis = {tile.label: tile.basis for tile in report_render.tiles(source, report_render.summarise(source))}
    assert basis.pop("Cost") == "unknown"
    assert len(basis) == 5 and set(basis.values()) == {"measured"}
    change(run_dir / "run.json", spent_usd=0.4149, spent_basis="measured hours x catalog price of 2026-11-20")
    source = read_run(run_dir)
    cost = report_render.tiles(source, report_render.summarise(source))[-1]
    assert (cost.value, cost.basis) == ("$0.41", "estimated") and "2026-11-20" in cost.note


def test_the_page_asks_for_nothing_outside_itself(full: Path, page: Page) -> None:
    html = (full / "report.html").read_text(encoding="utf-8")
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not page.values("src") and not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", html)
    links = [*page.values("href"), *page.values("xlink:href"), *page.values("src")]
    assert links and all(link.startswith("#") for link in links)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert not re.search(r"https?://", html)
    [policy] = [policy for policy in page.values("content") if "default-src 'none'" in policy]
    [(kind, script)] = [one for one in page.scripts if one[0] != "application/json"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert kind == "" and f"script-src 'sha256-{digest}';" in policy, "one script may run, and no other"


def test_ids_are_unique_over_all_plots_and_every_reference_has_its_target(full: Path, page: Page) -> None:
    ids = page.values("id")
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 4
    assert len(ids) == len(set(ids)) > 100
    html = (full / "report.html").read_text(encoding="utf-8")
    targets = {link[1:] for link in page.values("xlink:href")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert targets and targets <= set(ids)


def test_every_plot_has_a_text_alternative(page: Page) -> None:
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs.get("role") == "img" for tag, attrs in page.tags if tag == "svg")
    assert "training 2.34 to 0.316, validation 1.09 to 0.504" in labels[0]


def test_every_bar_has_its_interval_and_every_database_its_whole_name(run_dir: Path) -> None:
    base, tuned = rows(300)
    for row in base + tuned:
        row["db_id"] += f"_with_a_long_name_{int(row['id'][-4:]) % 5}"
    write_evaluation(run_dir, base=base, tuned=tuned)
    report_render.write_report(run_dir)
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    classes = page.values("class")
    fills = sum(name.startswith("fill ") for name in classes)
    assert fills == classes.count("whisker") == 2 * (1 + 4 + 30), (
        "all questions, 4 difficulties, 30 databases, 2 models"
    )
    scores = json.loads((run_dir / "eval.json").read_text())["models"]["tuned"]["by_database"]
    for text in (page.text, (run_dir / "report.md").read_text().replace("\\", "")):
        for name, group in scores.items():
            low, high = (100 * bound for bound in wilson(group["correct"], group["questions"]))
            share = 100 * group["correct"] / group["questions"]
            assert name in text
            assert f"{group['correct']} of {group['questions']}, {share:.1f}% ({low:.1f} to {high:.1f})" in text


def test_every_colour_of_the_plots_is_defined_for_light_and_for_dark(full: Path) -> None:
    html = (full / "report.html").read_text(encoding="utf-8")
    style = html.split("</style>")[0]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", svgs))
    assert {"ink", "after", "second"} <= used <= set(report_plots.COLOURS)
    assert all(f"--{name}: " in light and f"--{name}: " in dark for name in used)
    assert all(f"--{name}: {colour};" in light for name, colour in report_plots.COLOURS.items())
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)


def test_untrusted_text_is_escaped(run_dir: Path) -> None:
    base, tuned = rows(12)
    for row in base + tuned:
        row |= dict.fromkeys(("question", "gold", "prediction", "answer", "db_id", "difficulty"), EVIL)
        row["error"] = row["error"] and EVIL
    write_evaluation(run_dir, base=base, tuned=tuned, split=EVIL, rule=EVIL)
    change(run_dir / "run.json", run_name=EVIL, model={"name": EVIL}, packages={EVIL: EVIL}, status=EVIL)
    report_render.write_report(run_dir)
    html, markdown = ((run_dir / name).read_text(encoding="utf-8") for name in OUTPUTS[:2])
    page = Page(html)
    assert [kind for kind, _ in page.scripts] == ["application/json", ""], "the data and our script, nothing else"
    assert page.text.count("<script>alert('x')") > 10
    assert {one["question"] for one in page.data["questions"]} == {EVIL}
    outside_code = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line or line.startswith(("# Heading", "```")) for line in outside_code)
    assert not any(re.search(r"(?<!\\)\[link", line) for line in outside_code)
    assert any("alert" in line for line in outside_code)


def remove_answers(run_dir: Path) -> None:
    for path in (run_dir / "eval").iterdir():
        path.unlink()


def fail_at_once(run_dir: Path) -> None:
    (run_dir / "eval.json").unlink()
    write(run_dir / "run.json", {"status": "failed"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: (run / "eval.json").unlink(), "accuracy is unknown. To measure it: finetune evaluate "),
        (lambda run: write_evaluation(run, base=None, tuned=rows(150)[1]), "so the gain is unknown."),
        (lambda run: write_evaluation(run, base=rows(150)[0], tuned=None), "The base model answers 7 of 150"),
        (remove_answers, "No answers available."),
        (
            lambda run: change(run / "run.json", history=[]),
            "Few questions: each of the 150 is worth 0.7 points.",
        ),
        (lambda run: change(run / "run.json", status="interrupted"), "was interrupted after 240 of 240"),
        (fail_at_once, "The run failed: its training is not complete."),
    ],
)
def test_a_missing_part_is_named_and_does_not_stop_the_report(run_dir: Path, harm: Any, said: str) -> None:
    harm(run_dir)
    summary = report_render.write_report(run_dir)
    assert all(said in text for text in texts(run_dir))
    assert summary == json.loads((run_dir / "summary.json").read_text()) and len(summary) == 9
    assert not any(re.search(r"\bNone\b(?!\.| found)|undefined", text) for text in texts(run_dir))


def test_without_history_each_plot_says_that_nothing_was_logged(run_dir: Path) -> None:
    change(run_dir / "run.json", history=[])
    report_render.write_report(run_dir)
    html = texts(run_dir)[0]
    assert "No loss was logged." in html and html.count("Nothing was logged.") == 3


def test_figures_that_are_not_numbers_become_null(run_dir: Path) -> None:
    change(run_dir / "run.json", tokens_per_second=float("nan"), wall_seconds=None, peak_memory_gib=None)
    summary = report_render.summarise(read_run(run_dir))
    assert [summary[key] for key in ("tokens_per_second", "minutes", "peak_memory_gib")] == [None] * 3


@pytest.mark.parametrize(
    ("file", "text", "code", "message"),
    [
        ("run.json", None, "file.missing", r"run\.json.*`finetune train CONFIG`"),
        ("run.json", "[]", "file.bad_json", r"run\.json"),
        ("eval.json", '{"models": ', "file.bad_json", r"eval\.json.*finetune evaluate"),
        (
            "eval.json",
            '{"models": {"tuned": {"questions": 5, "correct": 1}}}',
            "report.bad_input",
            r"tuned lacks the number execution_accuracy",
        ),
        ("eval.json", '{"rule": [null]}', "report.bad_input", r"eval\.json: rule: expected a text"),
        (
            "eval/tuned.jsonl",
            '{"id": 1, "verdict": "correct"}\n{"id": "cut',
            "report.bad_input",
            r"tuned\.jsonl:2: not JSON",
        ),
        (
            "eval/base.jsonl",
            "17",
            "report.bad_input",
            r"base\.jsonl:1: not an answer with id and verdict; run `finetune evaluate",
        ),
    ],
)
def test_a_broken_input_is_a_users_error_and_nothing_is_written(
    run_dir: Path, file: str, text: str | None, code: str, message: str
) -> None:
    (run_dir / file).unlink()
    if text is not None:
        (run_dir / file).write_text(text)
    with raises(code, match=message):
        report_render.write_report(run_dir)
    assert not any((run_dir / name).exists() for name in OUTPUTS)


def test_a_full_disk_leaves_the_old_report_as_it_was(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_render, "draw_plots", lambda *_: [])
    report_render.write_report(run_dir)
    change(run_dir / "run.json", run_name="another")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with raises("disk.full"):
        report_render.write_report(run_dir)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before


def test_the_same_run_gives_the_same_bytes(full: Path) -> None:
    source = read_run(full)
    assert report_render.render(source, report_render.summarise(source)) == {
        name: (full / name).read_text(encoding="utf-8") for name in OUTPUTS[:2]
    }


def test_examples_are_sorted_into_won_lost_and_still_wrong(run_dir: Path) -> None:
    groups = examples(read_run(run_dir))
    gain = json.loads((run_dir / "eval.json").read_text())["gain"]
    assert [(group.title, group.total) for group in groups] == [
        ("Won", gain["won"]),
        ("Lost", gain["lost"]),
        ("Still wrong", gain["neither"]),
    ]
    for group, right in zip(groups, [(False, True), (True, False), (False, False)], strict=True):
        assert len(group.shown) == min(group.total, EXAMPLES)
        for row, (gold, base, tuned) in group.shown:
            assert gold.text == row["gold"]
            assert (base.verdict == "correct", tuned.verdict == "correct") == right


def test_examples_do_not_depend_on_the_order_of_the_answers(run_dir: Path) -> None:
    before = examples(read_run(run_dir))
    assert [row["id"][-4:] for row, _ in before[0].shown] == ["0042", "0140", "0008", "0000"]
    for path in (run_dir / "eval").iterdir():
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert examples(read_run(run_dir)) == before


def test_a_rambling_answer_is_cut_and_says_so(run_dir: Path) -> None:
    base, tuned = rows(1)
    tuned[0] |= {"prediction": "", "answer": "word " * 400, "verdict": "no_sql"}
    write_evaluation(run_dir, base=base, tuned=tuned)
    answer = examples(read_run(run_dir))[2].shown[0][1][2]
    assert answer.text.endswith("… (1400 more characters)") and len(answer.text) < 650


def test_a_long_gold_query_and_a_long_error_are_cut_too(run_dir: Path) -> None:
    base, tuned = rows(1)
    for answered in (base[0], tuned[0]):
        answered |= {"gold": "x" * 20_000, "error": "e" * 9_000, "verdict": "sql_error"}
    write_evaluation(run_dir, base=base, tuned=tuned)
    gold, *answers = examples(read_run(run_dir))[2].shown[0][1]
    assert gold.text.endswith("… (19400 more characters)") and len(gold.text) < 650
    assert all(answer.error.endswith("… (8400 more characters)") for answer in answers)


def test_the_line_ends_of_windows_are_line_ends(run_dir: Path) -> None:
    base, tuned = rows(4)
    for row in base + tuned:
        row |= {"question": "How many\r\nfarms?", "gold": "SELECT 1\r\nFROM t", "answer": "SELECT 2\r\nFROM t"}
        row |= {"prediction": row["answer"]}
    write_evaluation(run_dir, base=base, tuned=tuned)
    report_render.write_report(run_dir)
    html, markdown = ((run_dir / name).read_text(encoding="utf-8") for name in OUTPUTS[:2])
    assert "<pre>SELECT 1\nFROM t</pre>" in html and "    SELECT 2\n    FROM t" in markdown
    assert Page(html).data["questions"][0]["gold"] == "SELECT 1\nFROM t"
    assert "\\r" not in Page(html).text + markdown + json.dumps(Page(html).data, ensure_ascii=False).replace('\\"', "")


def test_errors_are_counted_by_kind() -> None:
    messages = ["no such column: a", "no such column: T1.b", "no such column: it's", None,
                'near "FROM": syntax error', 'near ";": syntax error', 'near "a: b": syntax error',
                "table t has no column named c", "table u has no column named d",
                "misuse of aggregate: COUNT()", "misuse of aggregate: SUM()",
                "wrong number of arguments to function ABS()", "wrong number of arguments to function MAX()"]  # fmt: skip
    found = report_render.common_errors([{"error": message} for message in messages])
    assert found == [
        ("syntax error", 3, 'near ";": syntax error'),
        ("no such column", 3, "no such column: T1.b"),
        ("misuse of aggregate", 2, "misuse of aggregate: COUNT()"),
        ("table … has no column named …", 2, "table t has no column named c"),
        ("wrong number of arguments to function …()", 2, "wrong number of arguments to function ABS()"),
    ]


def test_a_step_that_a_resumed_run_logged_twice_is_drawn_once() -> None:
    logged = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 3.0}]
    assert report_plots.draw_plots(logged)[0].caption == "training 9 to 3"


def test_plots_ignore_and_keep_the_users_matplotlib_settings() -> None:
    import matplotlib

    plain = report_plots.draw_plots(history(20))
    with matplotlib.rc_context({"font.size": 31, "xtick.major.size": 9}):
        assert report_plots.draw_plots(history(20)) == plain
        assert matplotlib.rcParams["font.size"] == 31


def test_names_in_any_script_are_drawn_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    plot = report_plots.draw_differences("Difference", [report_plots.Interval("漢字", 1.0, (0.0, 2.0), None)])
    assert "漢字" in plot.svg and not [str(one.message) for one in recwarn if "Glyph" in str(one.message)]


def test_importing_the_report_loads_no_heavy_library() -> None:
    heavy = {"matplotlib", "jinja2", "omegaconf", "torch", "transformers", "sqlglot", "numpy"}
    code = f"import sys, finetune.report.render; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
