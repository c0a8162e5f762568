"""`finetune compare`: what it concludes, what it writes, and what it refuses to compare."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.evaluation.generators import registry
from finetune.evaluation.run import evaluate_run
from finetune.evaluation.score import Row, write_rows
from finetune.evaluation.statistics import bootstrap_by_database, mcnemar_exact, paired_interval
from finetune.report.comparison import as_json, compare
from finetune.report.comparison_page import MOST_LISTED
from tests.helpers.dict_generator import DictGenerator
from tests.helpers.errors import raises, reported
from tests.helpers.predictions_examples import (
    as_jsonl,
    made,
    prepare_two,
    questions_of,
    untrained_run,
    write_config,
    write_result,
)
from tests.helpers.report_fixtures import Page
from tests.helpers.report_fixtures import change as change_file
from tests.helpers.run_examples import copy_run
from tests.helpers.scored_runs import scored_run

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[2J \u202e {{ 7 * 7 }} {% raw %} & \"'"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which comparisons/ is written into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(right: Sequence[bool], databases: int = 3, **changes: Any) -> list[Row]:
    levels = ("easy", "medium", "hard", "extra")
    return [
        made(
            "correct" if one else ("sql_error" if number % 2 else "wrong_rows"),
            number,
            db_id=f"db{number % databases}",
            difficulty=levels[number % 4],
            **changes,
        )
        for number, one in enumerate(right)
    ]


def results(right: Mapping[str, Sequence[bool]], **changes: Any) -> list[str]:
    return [str(write_result(Path(name), rows_of(one), **changes)) for name, one in right.items()]


def compared(*given: str, common: bool = False) -> dict[str, Any]:
    """compare.json, without the page, whose plots take most of the time."""
    value: dict[str, Any] = json.loads(json.dumps(as_json(compare(given, common=common))))
    return value


def written(*arguments: str) -> dict[str, Any]:
    """The same through the command line, with the page."""
    assert main(["compare", *arguments, "--output", "out"]) == 0
    value: dict[str, Any] = json.loads(Path("out/compare.json").read_text())
    return value


def page(folder: str = "out") -> Page:
    return Page((Path(folder) / "compare.html").read_text(encoding="utf-8"))


BETTER = {"a": [n % 5 == 0 for n in range(60)], "b": [n % 5 < 2 or n == 2 for n in range(60)]}


# what it concludes


def test_a_better_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = written(*results(BETTER))
    (pair,) = found["pairs"]
    assert (pair["won"], pair["lost"], pair["both"], pair["neither"]) == (13, 0, 12, 35)
    assert pair["p"] == pair["p_holm"] == mcnemar_exact(13, 0) == 2**-12
    assert pair["interval95"]["questions"] == list(paired_interval(13, 0, 60))
    points = [(sum(1 for n in range(60) if n % 3 == d and (n % 5 == 1 or n == 2)), 20) for d in range(3)]
    assert pair["interval95"]["databases"] == list(bootstrap_by_database(points) or ())
    low, high = (f"{100 * bound:+.1f}" for bound in pair["interval95"]["questions"])
    assert re.fullmatch(
        rf"b is better than a: \+21\.7 points \(95% interval {re.escape(low)} to {re.escape(high)} over questions\), "
        r"p = 0\.00024, won 13, lost 0; shown for these 3 databases, too few to say it of others",
        pair["conclusion"],
    )
    printed = capsys.readouterr().out.splitlines()
    assert pair["conclusion"] in printed and printed[0].startswith("a  20.0%  12 of 60") and "reference" in printed[0]
    assert [model["label"] for model in found["models"]] == ["a", "b"] and found["questions"] == 60
    assert "new_tokens" not in found["models"][0] and found["models"][1]["correct"] == 25


def test_the_other_way_round_it_is_worse() -> None:
    found = compared(*reversed(results(BETTER)))["pairs"][0]
    assert (found["won"], found["lost"], found["reference"], found["challenger"]) == (0, 13, "b", "a")
    assert found["conclusion"].startswith("a is worse than b: -21.7 points")
    assert [one["id"] for one in found["questions_lost"]][:3] == ["q1", "q2", "q6"] and found["questions_won"] == []


def test_a_difference_that_chance_explains() -> None:
    found = compared(*results({"a": [False] * 40, "b": [n < 5 for n in range(40)]}))["pairs"][0]
    assert mcnemar_exact(5, 0) == 0.0625 and found["conclusion"].startswith(
        "no difference shown between b and a: +12.5"
    )
    found = compared(*results({"c": [False] * 40, "d": [n < 6 for n in range(40)]}))["pairs"][0]
    assert mcnemar_exact(6, 0) < 0.05 and found["conclusion"].startswith("d is better than c: +15.0")


def test_the_same_verdicts_are_no_difference() -> None:
    same = [n < 9 for n in range(20)]
    found = compared(*results({"a": same, "b": same}))["pairs"][0]
    assert found["conclusion"] == "no difference: b and a are right on the same 9 of 20 questions"
    assert found["p"] == 1 and found["exceptions"] == []


def test_what_is_shown_for_these_databases_need_not_hold_for_others() -> None:
    first = write_result(Path("a"), [made("wrong_rows", n, db_id=f"db{n // 10}") for n in range(100)])
    rows = [made("correct" if n < 9 else "wrong_rows", n, db_id=f"db{n // 10}") for n in range(100)]
    found = compared(str(first), str(write_result(Path("b"), rows)))["pairs"][0]
    assert found["conclusion"].endswith("; shown for these databases, not for others: that interval includes 0")
    assert " over databases), p" in found["conclusion"], "ten of them are enough for it"
    one = [str(write_result(Path(name), rows_of(BETTER[name], databases=1))) for name in "ab"]
    assert compared(*one)["pairs"][0]["conclusion"].endswith(
        "; all questions are about one database, so nothing is shown for others"
    )


def test_of_many_models_one_does_not_look_better_by_chance(capsys: pytest.CaptureFixture[str]) -> None:
    right = {
        "a": [False] * 40,
        **{name: [n < 6 for n in range(40)] for name in "bcd"},
        "e": [n < 20 for n in range(40)],
    }
    found = written(*results(right))
    assert [pair["challenger"] for pair in found["pairs"]] == ["b", "c", "d", "e"] and found["reference"] == "a"
    assert {pair["reference"] for pair in found["pairs"]} == {"a"}
    assert [pair["p"] for pair in found["pairs"][:3]] == [2**-5] * 3 and 2**-5 < 0.05
    assert [pair["p_holm"] for pair in found["pairs"]] == [3 * 2**-5] * 3 + [4 * 2**-19]
    assert [pair["conclusion"].startswith("no difference shown") for pair in found["pairs"]] == [True] * 3 + [False]
    assert "p adjusted for 4 comparisons with a (Holm)" in capsys.readouterr().out
    assert "p is adjusted (Holm)" in page().text


def test_another_rule_or_leaving_out_hollow_golds_may_lead_to_another_conclusion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def under(right: bool, strict: bool, kind: str) -> dict[str, Any]:
        name = {True: "correct", False: "wrong_rows"}
        return {"verdicts": {"test_suite": name[right], "strict": name[strict]}, "gold_kind": kind}

    first = [replace(row, **under(False, False, "sound")) for row in rows_of([False] * 20)]
    second = [
        replace(row, **under(n < 8, n < 2, "no_rows" if n < 8 else "sound"))
        for n, row in enumerate(rows_of([n < 8 for n in range(20)]))
    ]
    first = [replace(row, gold_kind=other.gold_kind) for row, other in zip(first, second, strict=True)]
    found = written(str(write_result(Path("a"), first)), str(write_result(Path("b"), second)))["pairs"][0]
    assert found["conclusion"].startswith("b is better than a")
    assert [text.partition(" (")[0] for text in found["exceptions"]] == [
        "under the rule strict: no difference shown",
        "without hollow golds: no difference shown",
    ]
    assert (found["under"]["strict"]["won"], found["under"]["without hollow golds"]["won"]) == (2, 0)
    assert all(text in capsys.readouterr().out or text for text in found["exceptions"])
    assert "b and a under the rule strict: no difference shown" in page().text


# what it writes


def test_every_question_is_counted_once_in_each_grouping_and_listed_with_both_answers() -> None:
    rows = {name: rows_of(right) for name, right in BETTER.items()}
    rows["a"] = [replace(row, error_class=None if row.verdict == "correct" else "no_such_table") for row in rows["a"]]
    found = written(*(str(write_result(Path(name), one)) for name, one in rows.items()))["pairs"][0]
    for key in ("by_difficulty", "by_database"):
        groups = found[key].values()
        for count, total in (("questions", 60), ("reference", 12), ("challenger", 25), ("won", 13), ("lost", 0)):
            assert sum(group[count] for group in groups) == total, (key, count)
    assert set(found["by_difficulty"]) == {"easy", "medium", "hard", "extra"}
    classes = found["by_error_class"]
    assert classes["no_such_table"] == {"reference": 48, "challenger": 0, "repaired": 13, "new": 0}
    assert set(classes) == {"no_such_table", "unknown"}, "rows of an earlier version have no class"
    assert sum(one["challenger"] for one in classes.values()) == 35
    assert len(found["questions_won"]) == 13 and found["questions_won"][0] == {
        "id": "q1", "db_id": "db1", "question": "question 1?", "difficulty": "medium", "gold": "SELECT 1",
        "reference": {"sql": "SELECT 2", "verdict": "sql_error", "error_class": "no_such_table", "error": None},
        "challenger": {"sql": "SELECT 1", "verdict": "correct", "error_class": None, "error": None},
    }  # fmt: skip
    text = page().text
    for said in ("b is better than a", "Repaired", "no_such_table", "question 1?", "q1 · db1 · medium"):
        assert said in text


def test_the_page_is_self_contained_escaped_and_always_the_same() -> None:
    rows = [
        replace(
            row,
            question=HOSTILE,
            gold=HOSTILE,
            prediction=HOSTILE,
            db_id=f"{row.db_id}{HOSTILE}",
            error=HOSTILE,
            difficulty=HOSTILE,
            error_class=None if row.verdict == "correct" else HOSTILE,
        )
        for row in rows_of(BETTER["a"])
    ]
    better = [replace(row, verdict="correct", error_class=None) for row in rows]
    plain = write_result(Path("a"), rows)
    wild = write_result(Path("b<script>$x_1$ \u202e 'ü"), better, split=HOSTILE, prompt_version=HOSTILE)
    written(str(plain), str(wild))
    text = Path("out/compare.html").read_text(encoding="utf-8")
    read = page()
    assert not {tag for tag, _ in read.tags} & {"script", "img", "iframe", "link", "object", "form"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert {
        value for name in ("href", "src", "xlink:href") for value in read.values(name) if not value.startswith("#")
    } == set()
    assert "<script>alert(1)</script>" in read.text and r"\x1b[2J \u202e {{ 7 * 7 }}" in read.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    written(str(plain), str(wild))
    assert Path("out/compare.html").read_text(encoding="utf-8") == text


def test_ids_are_unique_with_several_plots_of_a_kind() -> None:
    written(*results({"a": [False] * 8, "b b": [True] * 8, "b-b": [n < 4 for n in range(8)]}))
    ids = page().values("id")
    assert len(ids) > 20 and len(ids) == len(set(ids))


def test_the_page_shows_the_first_of_many_and_the_json_has_all() -> None:
    number = MOST_LISTED + 50
    found = written(*results({"a": [True] * number, "b": [False] * number}))
    assert len(found["pairs"][0]["questions_lost"]) == number
    text = page().text
    assert f"Lost ({number})" in text and "50 more are in compare.json" in text
    assert f"question {MOST_LISTED - 1}?" in text and f"question {MOST_LISTED}?" not in text


def test_a_long_answer_is_cut_on_the_page_only() -> None:
    rows = [replace(row, prediction="SELECT " + "x" * 5000) for row in rows_of([False] * 4)]
    found = written(str(write_result(Path("a"), rows)), *results({"b": [True] * 4}))
    assert len(found["pairs"][0]["questions_won"][0]["reference"]["sql"]) == 5007
    assert "4407 more characters" in page().text


def test_an_answer_without_sql_is_shown_as_it_is() -> None:
    rows = [replace(row, prediction="", answer="I cannot.") for row in rows_of([False] * 4)]
    found = written(str(write_result(Path("a"), rows)), *results({"b": [True] * 4}))
    assert found["pairs"][0]["questions_won"][0]["reference"]["sql"] == "I cannot."
    assert "I cannot." in page().text


def test_names_that_are_cut_get_a_folder_each(here: Path) -> None:
    long = "a-long-name-of-thirty-characters"
    folders = [str(write_result(Path(f"{long}{n}"), rows_of(BETTER["a"]))) for n in range(5)]
    for others in (folders[1:2], folders[2:3], folders[1:4], folders[1:5]):
        assert main(["compare", folders[0], *others]) == 0
    names = {path.name for path in (here / "comparisons").iterdir()}
    assert len(names) == 4 and all(name.startswith(f"{long[:30]}-vs-{long[:30]}-") for name in names)


def test_where_it_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = results(BETTER)
    assert main(["compare", *names]) == 0 == main(["compare", *names])
    assert {path.name for path in (here / "comparisons" / "a-vs-b").iterdir()} == {"compare.html", "compare.json"}
    assert capsys.readouterr().out.splitlines()[-1] == "comparison: comparisons/a-vs-b/compare.html"
    odd = [
        str(write_result(Path(f"x{n}/{name}"), rows_of(BETTER["a"])))
        for n, name in enumerate(("r:1 ü", "same", "same"))
    ]
    assert main(["compare", *odd]) == 0
    assert (here / "comparisons" / "r-1-ü-vs-x1-same-vs-x2-same").is_dir(), "labels of one name are paths"
    Path("file").write_text("mine")
    with reported("compare.output_taken"):
        assert main(["compare", *names, "--output", "file"]) == 2
    with reported("disk.error"):
        assert main(["compare", *names, "--output", "file/below"]) == 2
    assert Path("file").read_text() == "mine"


def test_what_a_reader_must_know_is_in_the_notes() -> None:
    right = [n % 2 == 0 for n in range(20)]
    first = write_result(Path("a"), rows_of(right, gold_kind="no_rows"), split="val", prompt_version="1-ddl-x")
    second = write_result(Path("b"), rows_of(right, gold_kind="no_rows"), split="val", prompt_version="1-compact-y")
    said = " ".join(compared(str(first), str(second))["notes"])
    for text in (
        "Other prompts: 1-ddl-x (a), 1-compact-y (b)",
        "from the val split",
        "each of the 20 is worth 5.0 points",
        "about 3 databases",
        "Hollow gold queries, which a constant answers or which depend on the time: 20 of 20",
        "b gives the same SQL as a to 20 of 20",
        "training seed",
    ):
        assert text in said
    assert "The prompts of a, b are not known." in compared(*results(BETTER))["notes"]


# runs


@pytest.fixture
def two_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Two evaluated copies of a trained run; `right` of the six questions are answered by base and tuned model of each."""

    def evaluated(*right: tuple[int, int], **sections: dict[str, Any]) -> list[Path]:
        from finetune.data.prepared import load_prepared
        from finetune.data.prompts import load_template

        runs = []
        for number, (base, tuned) in enumerate(right):
            run = copy_run(tiny_run, tmp_path / f"runs{number}", **sections)
            named = run.path.rename(run.path.parent / f"run{number}")
            run = replace(run, path=named)
            template = load_template(run.adapter)
            records = load_prepared(Path(run.config().data.output_dir)).records("test")
            asked = [(template.render_record(record), record.sql) for record in records]
            answers = [
                {prompt: sql if place < count else "SELECT 1" for place, (prompt, sql) in enumerate(asked)}
                for count in (base, tuned)
            ]
            monkeypatch.setitem(registry.GENERATORS, "dict", DictGenerator(*answers))
            evaluate_run(run, generator="dict", progress=False)
            runs.append(run.path)
        return runs

    return evaluated


def test_two_trained_runs_and_a_base_model(two_runs: Callable[..., list[Path]]) -> None:
    first, second = two_runs((0, 1), (0, 6))
    found = compared(str(first), str(second), f"{second}:base")
    assert [model["label"] for model in found["models"]] == ["run0", "run1", "run1:base"]
    assert [model["correct"] for model in found["models"]] == [1, 6, 0]
    assert found["models"][1]["adapter"].endswith("run1/adapter")
    assert not any("leaks" in note or "prompt" in note for note in found["notes"])


def test_a_run_against_its_base_is_the_gain_of_evaluate(two_runs: Callable[..., list[Path]]) -> None:
    (run,) = two_runs((2, 5))
    pair = compared(f"{run}:base", str(run))["pairs"][0]
    evaluation = json.loads((run / "eval.json").read_text())
    assert {name: pair[name] for name in ("won", "lost", "both", "neither")} == evaluation["gain"]
    assert pair["interval95"]["questions"] == evaluation["gain_interval95"]["questions"]
    for rule, counts in evaluation["gain_by_rule"].items():
        assert {name: pair["under"][rule][name] for name in counts} == counts


def test_somebody_elses_answers_against_a_run(two_runs: Callable[..., list[Path]], tiny_data: Path) -> None:
    (run,) = two_runs((0, 3))
    records = questions_of(tiny_data)
    Path("theirs.jsonl").write_text(as_jsonl({record.id: record.sql for record in records}))
    assert main(["evaluate", str(run), "--predictions", "theirs.jsonl"]) == 0
    found = compared(str(run), f"{run}:theirs")
    assert [model["label"] for model in found["models"]] == ["run0", "run0:theirs"]
    assert (found["pairs"][0]["won"], found["pairs"][0]["lost"]) == (3, 0)
    assert "The prompts of run0:theirs are not known." in found["notes"]
    with reported("compare.not_evaluated"):
        assert main(["compare", str(run), f"{run}:others"]) == 2


def test_data_that_a_run_was_not_trained_on_are_said(two_runs: Callable[..., list[Path]]) -> None:
    (run,) = two_runs((0, 3))
    for path, change in (("run.json", lambda value: value["data"]), ("eval.json", lambda value: value)):
        value = json.loads((run / path).read_text())
        if path == "run.json":
            change(value)["manifest_sha256"] = "b" * 64
        (run / path).write_text(json.dumps(value))
    assert any("run0" in note and "leaks are possible" in note for note in compared(f"{run}:base", str(run))["notes"])


# what it refuses


def refused(code: str, *arguments: str, said: str = "") -> str:
    with reported(code), pytest.MonkeyPatch.context() as patched:
        told: list[str] = []
        patched.setattr("sys.stderr.write", told.append)
        assert main(["compare", *arguments]) == 2
    message = "".join(told)
    assert said in message, message
    assert not Path("comparisons").exists()
    return message


def test_what_is_no_result(tmp_path: Path) -> None:
    (good,) = results({"a": [True] * 4})
    refused("cli.conflicting_options", good)
    refused("compare.not_found", good, "absent", said="absent: no such folder")
    refused("compare.not_found", good, "absent:base")
    refused("compare.not_found", good, f"{good}/rows.jsonl", said="found a file")
    refused("compare.not_found", good, ":base")
    Path("empty").mkdir()
    refused("compare.not_evaluated", good, "empty", said="neither a run folder nor a result")
    refused("compare.not_evaluated", good, f"{good}:tuned", said="holds no score of 'tuned', only of predictions")
    run = untrained_run(write_config(tmp_path, prepare_two(tmp_path)))
    refused("compare.not_evaluated", good, str(run.path), said="run `finetune evaluate")
    refused("compare.not_evaluated", good, f"{run.path}:base", said="there are none")
    refused("compare.same", good, f"{good}/", said="given twice")


def test_verdicts_by_another_rule_or_limit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in the message makes them comparable."""
    config = write_config(here, prepare_two(here))
    golds = [record.sql for record in questions_of(here / "prepared")]
    for name, lines in (("a", golds), ("b b", ["SELECT 1"] * 6)):
        Path(f"{name}.sql").write_text("\n".join(lines))
        rule = ["evaluation.rule=strict", "evaluation.timeout_seconds=5"] if name == "b b" else []
        assert main(["evaluate", str(config), "--predictions", f"{name}.sql", *rule]) == 0
    both = [f"runs/predictions/{name}" for name in ("a", "b b")]
    message = refused("compare.other_rule", *both, said="evaluation.rule 'test_suite' and 'strict'")
    assert "evaluation.timeout_seconds 10.0 and 5.0" in message
    (command,) = re.findall(r"judge again: `(.*)`", message)
    assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    assert written(*both)["pairs"][0]["lost"] == 6


def test_results_of_earlier_versions_are_compared_by_rule_and_time_limit() -> None:
    first, second = results(BETTER)
    write_result(
        Path("c"), rows_of(BETTER["b"]), judging={"rule": "test_suite", "timeout_seconds": 10.0, "max_rows": 5}
    )
    assert compared(first, "c")["pairs"][0]["won"] == 13
    write_result(Path("d"), rows_of(BETTER["b"]), timeout_seconds=3.0)
    refused("compare.other_rule", second, "d", said="evaluation.timeout_seconds=10.0")


def test_verdicts_of_another_version_of_the_judge() -> None:
    for name, version in (("a", 3), ("b", 4)):
        judging = {"rule": "test_suite", "timeout_seconds": 10.0, "versions": [version, "3.40.1", "30.30.0"]}
        write_result(Path(name), rows_of(BETTER[name]), judging=judging)
    message = refused("compare.other_rule", "a", "b", said="versions of judge, SQLite and sqlglot")
    assert message.count("finetune evaluate theirs.yaml --predictions theirs.sql --name") == 2


def test_other_questions_are_compared_on_the_common_ones_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {name: rows_of(right) for name, right in BETTER.items()}
    write_result(Path("a"), rows["a"][:50])
    write_result(Path("b"), rows["b"][10:])
    refused("compare.other_questions", "a", "b", said="other questions: a 50, b 50, 40 of them in common; add --common")
    found = written("a", "b", "--common")
    assert found["questions"] == 40 == sum(found["pairs"][0][key] for key in ("won", "lost", "both", "neither"))
    assert found["models"][0]["questions"] == 40 and found["models"][0]["questions_evaluated"] == 50
    assert "40 of them in common; only the common ones are compared." in found["notes"][0]
    assert found["notes"][0] in capsys.readouterr().out
    write_result(Path("c"), rows["b"][50:])
    refused("compare.other_questions", "a", "c", "--common", said="no question in common")


def test_without_a_common_question_nothing_advises_to_compare_the_common_ones(tmp_path: Path) -> None:
    """And two splits are named, with the command that asks both the same."""
    rows = rows_of(BETTER["b"])
    write_result(Path("a"), rows[:30], split="val")
    write_result(Path("b"), rows[30:], split="test", data_manifest_sha256="b" * 64)
    message = refused("compare.other_questions", "a", "b", said="no question in common")
    assert "--common" not in message and "a was asked the split val, b the split test\n" in message
    run = scored_run(tmp_path, "second try", right=0.5)
    change_file(run / "eval.json", split="val", judging={"rule": "test_suite", "timeout_seconds": 10.0})
    message = refused("compare.other_questions", str(run), "b", said="no question in common")
    assert "--common" not in message
    assert f"ask both the same with `finetune evaluate '{run}' evaluation.split=test`" in message


def test_another_gold_under_the_same_id() -> None:
    rows = rows_of(BETTER["b"])
    changed = [replace(row, gold="SELECT 3") if n < 7 else row for n, row in enumerate(rows)]
    write_result(Path("b"), changed)
    results({"a": BETTER["a"]})
    refused("compare.other_questions", "a", "b", said="7 questions have another text, database or gold query")
    assert compared("a", "b", common=True)["questions"] == 53
    write_result(Path("b"), [replace(row, db_id="elsewhere") for row in rows])
    refused("compare.other_questions", "a", "b", "--common", said="no question in common")


def test_other_prepared_data() -> None:
    results({"a": BETTER["a"]})
    results({"b": BETTER["b"]}, data_manifest_sha256="b" * 64)
    refused("compare.other_data", "a", "b", said="add --common")
    found = compared("a", "b", common=True)
    assert found["questions"] == 60 and "the same databases may hold other rows" in found["notes"][0]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("eval.json", "{", "file.bad_json"),
        ("eval.json", "[]", "file.bad_json"),
        ("eval.json", '{"models": {"predictions": 7}}', "compare.bad_input"),
        ("eval.json", '{"models": 7}', "compare.not_evaluated"),
        ("rows.jsonl", "", "compare.bad_input"),
        ("rows.jsonl", "{\n", "compare.bad_input"),
        ("rows.jsonl", '{"id": "q1"}\n', "compare.bad_input"),
        ("rows.jsonl", "7\n", "compare.bad_input"),
        ("rows.jsonl", None, "compare.bad_input"),
    ],
)
def test_broken_files(name: str, content: str | None, code: str) -> None:
    good, bad = results({"a": [True] * 4, "b": [True] * 4})
    path = Path(bad) / name
    path.unlink() if content is None else path.write_text(content)
    refused(code, good, bad, said=bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 1),
        ("question", None),
        ("verdict", []),
        ("error", 1),
        ("verdicts", []),
        ("verdicts", {"strict": 1}),
        ("gold_kind", 1),
        ("new_tokens", None),
        ("new_tokens", 1.5),
        ("prompt_tokens", "5"),
        ("several_statements", [1]),
        ("double_quoted_text", 1),
    ],
)
def test_a_row_with_a_field_of_another_type(field: str, value: object) -> None:
    good, bad = results({"a": [True] * 4, "b": [True] * 4})
    lines = (Path(bad) / "rows.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
    (Path(bad) / "rows.jsonl").write_text("\n".join(lines))
    refused("compare.bad_input", good, bad, said=f"rows.jsonl:2: {field}")


def test_a_number_that_json_cannot_say() -> None:
    good, bad = results({"a": [True] * 4, "b": [True] * 4})
    value = json.loads((Path(bad) / "eval.json").read_text())
    value["models"]["predictions"]["adapter"] = {"scale": [1.0, float("nan")]}
    (Path(bad) / "eval.json").write_text(json.dumps(value))
    refused("compare.bad_input", good, bad, said="models.predictions.adapter.scale.1: NaN")


def test_rows_that_are_not_those_of_the_scores() -> None:
    good, bad = results({"a": [True] * 4, "b": [True] * 4})
    write_rows(Path(bad) / "rows.jsonl", rows_of([True] * 3 + [False]))
    refused("compare.bad_input", good, bad, said="3 of 4 are correct, but eval.json says 4 of 4")
    write_rows(Path(bad) / "rows.jsonl", [*rows_of([True] * 4), rows_of([True] * 4)[0]])
    refused("compare.bad_input", good, bad, said="'q0' is there twice")


def test_a_result_that_names_rows_outside_its_folder() -> None:
    good, bad = results({"a": [True] * 4, "b": [True] * 4})
    value = json.loads((Path(bad) / "eval.json").read_text())
    value["models"]["predictions"]["rows"] = "../a/rows.jsonl"
    (Path(bad) / "eval.json").write_text(json.dumps(value))
    refused("report.bad_input", good, bad, said="expected a file in the run's folder")


def test_read_by_python_it_raises_the_same_errors() -> None:
    with raises("compare.not_found"):
        compare(["nowhere", "absent"])
