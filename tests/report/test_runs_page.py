"""`finetune runs --html`: one page of all runs, whatever state they are in, and the comparison that it makes in a browser."""

from __future__ import annotations

import json
import re
import time
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from finetune.budget.ledger import Ledger
from finetune.cli.main import main
from finetune.report.comparison import compare, conclusion
from finetune.report.render import write_report
from finetune.report.runs import rows_of
from finetune.report.runs_page import write_runs_page
from finetune.runtime.quantities import usd_text
from tests.helpers.browser import PHONE, Open, background, browser, contrast, open_page, overflow
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import Page, change
from tests.helpers.scored_runs import JUDGING, many_runs, scored_run

__all__ = ["browser", "open_page"]
HOSTILE = "</script><img src=x onerror=alert(1)> \"'ü\u202e"
SHOWN = ".browse tbody tr[data-row]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = many_runs(tmp_path_factory.mktemp("many") / "runs", 12)
    write_report(root / "run-003")
    write_runs_page(root, rows_of(root))
    return root


def page_of(root: Path) -> Path:
    return write_runs_page(root, rows_of(root))


def names(page: Any) -> list[str]:
    found: list[str] = page.locator(f"{SHOWN} td:nth-child(2)").all_inner_texts()
    return found


def choose(page: Any, *chosen: str) -> str:
    for name in chosen:
        page.get_by_label(f"compare {name}", exact=True).check()
    return str(page.inner_text("#comparison"))


def test_the_command_writes_one_page_that_asks_for_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--html"]) == 0
    assert capsys.readouterr().out == f"page: {runs / 'index.html'}\n"
    html = (runs / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not page.values("src") and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    newest = sorted(rows_of(runs), key=lambda row: str(row.started_at), reverse=True)
    assert [one["name"] for one in page.data["runs"]] == [row.name for row in newest]


def test_filters_and_headings(runs: Path, open_page: Open) -> None:
    page = open_page(runs / "index.html")
    page.get_by_label("Model").select_option("one/model")
    assert page.inner_text("[role=status]") == "6 of 12 runs"
    assert sorted(names(page)) == [f"run-{place:03d}" for place in range(0, 12, 2)]
    page.get_by_role("button", name="Show all").click()
    page.locator("th button", has_text="Right").click()
    shares = [float(text.rstrip("%")) for text in page.locator(f"{SHOWN} td:nth-child(6)").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 6, "the best first"
    page.locator("th button", has_text="$ a point").click()
    page.locator("th button", has_text="$ a point").click()
    prices = [float(text) for text in page.locator(f"{SHOWN} td:nth-child(11)").all_inner_texts()]
    assert prices == sorted(prices), "and on another click the cheapest"
    page.get_by_label("Search").fill("run-00")
    assert len(names(page)) == 10
    assert page.locator("#plot .dot").count() == 10, "the plot shows what the table shows"


def test_each_run_leads_to_its_report(runs: Path, tmp_path: Path, open_page: Open) -> None:
    page = open_page(runs / "index.html")
    assert page.get_by_role("link", name="run-003", exact=True).get_attribute("href") == "./run-003/report.html"
    assert page.locator(f"{SHOWN} a").count() == 1, "the others have none"
    elsewhere = write_runs_page(runs, rows_of(runs), tmp_path / "deep" / "er" / "all.html")
    link = open_page(elsewhere).get_by_role("link", name="run-003", exact=True).get_attribute("href")
    assert (elsewhere.parent / unquote(link)).resolve() == (runs / "run-003/report.html").resolve()


def test_the_plot_has_a_point_and_an_interval_for_each_run(runs: Path, open_page: Open) -> None:
    page = open_page(runs / "index.html")
    assert page.locator("#plot .dot").count() == page.locator("#plot .error-bar").count() == 12
    by_name = {row.name: row for row in rows_of(runs)}
    heights = {}
    for point in page.locator("#plot :is(a, g):has(> .dot)").all():
        name = point.locator("title").text_content().partition(":")[0]
        heights[name] = float(point.locator(".dot").get_attribute("cy"))
    order = sorted(by_name, key=lambda name: (by_name[name].accuracy or 0.0, name))
    assert sorted(heights, key=lambda name: (-round(heights[name], 6), name)) == order
    assert page.locator("#plot a").get_attribute("href") == "./run-003/report.html"


PAIRS = [
    ("none", {"right": 0.5, "seed": 1}, {"right": 0.5, "seed": 2}),
    ("better", {"right": 0.2}, {"right": 0.8}),
    ("worse", {"right": 0.8}, {"right": 0.3}),
    ("equal", {"right": 0.5}, {"right": 0.5}),
    ("one database", {"right": 0.2, "databases": 1}, {"right": 0.7, "databases": 1}),
    ("two databases", {"right": 0.3, "databases": 2}, {"right": 0.6, "databases": 2}),
    ("many", {"right": 0.50, "questions": 1034, "databases": 97}, {"right": 0.56, "questions": 1034, "databases": 97}),
    ("a quarter point", {"right": 0.50, "questions": 400, "databases": 16}, {"right": 0.505, "questions": 400, "databases": 16}),
    ("ten databases", {"right": 0.2, "databases": 10}, {"right": 0.7, "databases": 10}),
    ("all", {"right": 0.0}, {"right": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_the_page_says_what_finetune_compare_says(
    tmp_path: Path, open_page: Open, first: dict[str, Any], second: dict[str, Any]
) -> None:
    runs = [scored_run(tmp_path, name, **settings) for name, settings in (("the first", first), ("the second", second))]
    page = open_page(page_of(tmp_path))
    said = choose(page, "the first", "the second")
    for reference, challenger in (runs, runs[::-1]):
        [versus] = compare([str(reference), str(challenger)]).versus
        sentence = page.locator(".conclusion").text_content()
        assert sentence == f"{conclusion(versus)}.".replace("no difference", "No difference", 1)
        assert f"{versus.found.won}, {versus.found.lost}" in said or reference is runs[1]
        page.get_by_role("button", name="Swap").click()


def test_the_intervals_are_those_of_compare_to_the_last_digit(tmp_path: Path, browser: Any) -> None:
    """Rounded to one digit a wrong generator of random numbers might go unseen."""
    from finetune.evaluation.statistics import bootstrap_by_database, mcnemar_exact, paired_interval
    from finetune.report.pages import pages

    environment = pages()
    assert environment.loader is not None
    source = environment.loader.get_source(environment, "statistics.js")[0]
    page = browser.new_page()
    page.set_content("<p>empty</p>")
    page.evaluate(f"{source}; window.found = {{ mcnemar, pairedInterval, bootstrap }}; 0")
    for databases in ([(3, 10), (-1, 7)], [(place % 5 - 2, 3 + place % 11) for place in range(33)]):
        found = page.evaluate("([a, b]) => found.bootstrap(a, b, 10000, 20)", list(zip(*databases, strict=True)))
        assert tuple(found) == bootstrap_by_database(databases)
    for won, lost in ((0, 1), (5, 5), (30, 11), (700, 20), (517, 517)):
        assert page.evaluate("([w, l]) => found.mcnemar(w, l)", [won, lost]) == pytest.approx(
            mcnemar_exact(won, lost), rel=1e-12
        )
        interval = page.evaluate("([w, l]) => found.pairedInterval(w, l, 2000)", [won, lost])
        assert interval == pytest.approx(paired_interval(won, lost, 2000), rel=1e-12)
    page.close()


@pytest.mark.parametrize(
    ("settings", "code", "reason"),
    [
        ({"questions": 30}, "compare.other_questions", "they were asked other questions"),
        ({"judging": {**JUDGING, "rule": "strict"}}, "compare.other_rule", "they were judged differently: rule"),
        ({"data": "other"}, "compare.other_data", "they were evaluated on other prepared data"),
    ],
)
def test_what_compare_refuses_the_page_refuses(
    tmp_path: Path, open_page: Open, settings: dict[str, Any], code: str, reason: str
) -> None:
    data = settings.pop("data", None)
    first, second = scored_run(tmp_path, "a", right=0.4), scored_run(tmp_path, "b", right=0.6, **settings)
    if data:
        change(second / "eval.json", data_manifest_sha256=data)
    with raises(code):
        compare([str(first), str(second)])
    said = choose(open_page(page_of(tmp_path)), "a", "b")
    assert reason in said and f"finetune compare {first} {second} --common" in said


def test_names_stay_as_they_are_in_the_conclusion(tmp_path: Path, open_page: Open) -> None:
    scored_run(tmp_path, "a", right=0.2)
    scored_run(tmp_path, "no lora", right=0.8)
    page = open_page(page_of(tmp_path))
    choose(page, "a", "no lora")
    assert page.inner_text(".conclusion").startswith("no lora is better than a:")
    page.get_by_role("button", name="Swap").click()
    assert page.inner_text(".conclusion").startswith("a is worse than no lora:")


def test_dollars_that_the_ledger_cannot_count_are_no_cheap_point(tmp_path: Path, open_page: Open) -> None:
    scored_run(tmp_path, "whole", right=0.5)
    run = scored_run(tmp_path, "partly", right=0.6)
    page = open_page(page_of(tmp_path))
    assert page.locator("#plot .dot.unsure").count() == 0 and "hollow" not in page.inner_text("figcaption")
    log = Ledger(run / "ledger").new_attempt(2, machine={}, price=None, resumed_step=None)
    log.begin(0.0)
    page = open_page(page_of(tmp_path))
    assert page.locator("#plot .dot").count() == 2 and page.locator("#plot .dot.unsure").count() == 1
    [hollow] = page.locator("#plot :is(a, g):has(> .unsure) title").all_text_contents()
    assert hollow.startswith("partly: ") and "no price for attempt 2" in hollow
    assert "its dollars may be too few" in page.inner_text("figcaption")
    assert "no price for attempt 2" in page.locator(SHOWN, has_text="partly").inner_text()


def test_small_dollars_are_no_zeros(tmp_path: Path, open_page: Open, browser: Any) -> None:
    change(scored_run(tmp_path, "cheap", right=0.5, usd=0.004) / "eval.json", cost={"usd_per_point": 0.00042})
    page = open_page(page_of(tmp_path))
    cells = [page.locator(f"{SHOWN} td:nth-child({number})").inner_text() for number in (10, 11)]
    assert cells == ["0.004", "0.00042"] and "$0.004" in page.locator("#plot title").text_content()
    source = (resources.files("finetune.report") / "templates/scatter.js").read_text(encoding="utf-8")
    bare = browser.new_page()
    bare.set_content("<p>empty</p>")
    bare.evaluate(f"{source}; window.usdText = usdText; 0")
    for usd in (0.0, 0.1, 0.123, 0.0999, 12.345, 1234.5, 0.0123, 0.00042, 2e-7, 3e-12):
        assert bare.evaluate("(usd) => usdText(usd)", usd) == usd_text(usd).removeprefix("$")
    bare.close()


def test_runs_of_two_splits_get_no_command_that_would_be_refused(tmp_path: Path, open_page: Open) -> None:
    for name, split in (("a", "test"), ("b", "val")):
        change(scored_run(tmp_path, name, right=0.5) / "eval.json", split=split)
    said = choose(open_page(page_of(tmp_path)), "a", "b")
    assert "they were asked different splits" in said and "--common" not in said


def test_a_third_choice_replaces_the_first(runs: Path, open_page: Open) -> None:
    page = open_page(runs / "index.html")
    assert "Choose two runs" in page.inner_text("#comparison")
    assert "run-001 is the reference" in choose(page, "run-001")
    choose(page, "run-002", "run-004")
    assert "run-004" in page.inner_text(".conclusion") and "run-002" in page.inner_text(".conclusion")
    assert page.locator(f"{SHOWN} input:checked").count() == 2


def test_runs_in_any_state_have_a_row(tmp_path: Path, open_page: Open) -> None:
    scored_run(tmp_path, "whole", right=0.5)
    (scored_run(tmp_path, "broken", right=0.5) / "run.json").write_text("{")
    (scored_run(tmp_path, "not scored", right=0.5, status="running") / "eval.json").unlink()
    (scored_run(tmp_path, "without answers", right=0.5) / "eval" / "tuned.jsonl").unlink()
    scored_run(tmp_path, "without dollars", right=0.5, usd=None)
    page = open_page(page_of(tmp_path))
    shown = dict(zip(names(page), page.locator(SHOWN).all(), strict=True))
    broken = next(name for name in shown if name.startswith("broken"))
    assert "run.json: not readable as JSON" in broken
    assert "1 run has something that could not be read or counted" in page.inner_text("header")
    boxes = {name: row.locator("input") for name, row in shown.items()}
    assert boxes["not scored"].get_attribute("title") == "no score"
    assert "is missing" in boxes["without answers"].get_attribute("title")
    assert [boxes[name].is_enabled() for name in ("whole", "not scored", "without answers")] == [True, False, False]
    assert "2 without dollars or without a score are not drawn" in page.inner_text("figcaption")


def test_hostile_names_stay_text(tmp_path: Path, open_page: Open) -> None:
    root = tmp_path / "runs"
    name = "javascript:alert(1) <b> ü 'q' \" &"
    run = scored_run(root, name, right=0.5, model={"name": HOSTILE}, status=HOSTILE)
    scored_run(root, "b", right=0.6)
    write_report(run)
    page = open_page(page_of(root))
    assert page.locator("img, main script, main b").count() == 0
    visible = HOSTILE.replace("\u202e", "\\u202e")
    row = page.locator(SHOWN, has_text="javascript:")
    assert row.locator("td:nth-child(3)").inner_text() == row.locator("td:nth-child(4)").inner_text() == visible
    link = row.locator("a").get_attribute("href")
    assert link.startswith("./") and (root / unquote(link)).resolve() == (run / "report.html").resolve()
    choose(page, name, "b")
    assert name in page.inner_text(".conclusion")


def test_one_run_is_not_called_runs(tmp_path: Path, open_page: Open) -> None:
    scored_run(tmp_path, "a", right=0.5)
    page = open_page(page_of(tmp_path))
    assert page.inner_text("[role=status]") == "1 run" and "1 run, 1 of them scored" in page.inner_text("header")
    assert page.locator("#plot svg").get_attribute("aria-label") == "Dollars against accuracy of 1 run"


def test_no_runs(tmp_path: Path, open_page: Open) -> None:
    page = open_page(page_of(tmp_path))
    assert "0 runs, 0 of them scored" in page.inner_text("main") and "finetune train CONFIG" in page.inner_text("main")


def test_a_page_that_cannot_be_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with raises("runs.output_taken", match="is a folder; give --output another file"):
        write_runs_page(runs, rows_of(runs), tmp_path)
    assert main(["runs", str(runs), "--output", str(tmp_path / "a.html")]) == 2
    assert "--output: belongs to --html; add --html" in capsys.readouterr().err
    assert main(["runs", str(runs), "--json", "--html"]) == 2
    assert "--json and --html: expected one of them" in capsys.readouterr().err


def test_phone_dark_and_print(runs: Path, open_page: Open) -> None:
    page = open_page(runs / "index.html", viewport=PHONE)
    choose(page, "run-001", "run-011")
    assert overflow(page) <= 0
    for scheme in ("light", "dark"):
        page = open_page(runs / "index.html", color_scheme=scheme)
        choose(page, "run-001", "run-011")
        assert (sum(background(page)) < 150) == (scheme == "dark")
        for selector in (
            ".lead",
            ".conclusion",
            ".browse td",
            ".browse th button",
            "#comparison dt",
            "#comparison pre",
        ):
            assert contrast(page, selector) >= 4.5, selector
    assert page.pdf().startswith(b"%PDF-")


@pytest.mark.slow
def test_five_hundred_runs(tmp_path: Path, open_page: Open) -> None:
    root = many_runs(tmp_path / "runs", 500, questions=20)
    page_file = page_of(root)
    assert page_file.stat().st_size < 2e6
    began = time.monotonic()
    page = open_page(page_file)
    page.locator(SHOWN).nth(99).wait_for()
    assert time.monotonic() - began < 8
    assert page.inner_text("[role=status]") == "500 runs, the first 100 shown"
    assert page.locator("#plot .dot").count() == 500
    data = json.loads(Page(page_file.read_text(encoding="utf-8")).scripts[0][1])
    assert len(data["sets"]) == 1, "equal questions are kept once"
