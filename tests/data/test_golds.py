"""Gold queries that say little about an answer: `data check` names them, and refuses those that contradict themselves."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.config.schema import SourceSection
from finetune.data.check import Findings, check
from finetune.data.golds import Golds
from finetune.data.validate import FAULTS
from tests.helpers.data_examples import SCHEMA, data_section, jsonl_source, make_database, row, run_prepare, write_jsonl
from tests.helpers.executed import executed

ConfigWriter = Callable[..., Path]


def source(folder: Path, golds: dict[int, str] | None = None, *, items: int = 40, records: int = 40) -> SourceSection:
    """Records about a database of so many items; golds: the gold queries that differ from those of `row`."""
    if not (folder / "databases").exists():
        make_database(folder / "databases", items=items)
    lines = [row(number, **({"sql": golds[number]} if golds and number in golds else {})) for number in range(records)]
    return jsonl_source(write_jsonl(folder / "records.jsonl", lines), databases=str(folder / "databases"))


def found(section: SourceSection) -> Findings:
    return check(data_section([section], "nowhere"), timeout_seconds=10.0, progress=False)


def test_each_kind_of_gold_query_is_flagged_with_its_place_and_used(tmp_path: Path) -> None:
    golds = {
        1: "SELECT name FROM item WHERE id = 99",
        2: "SELECT COUNT(*) FROM item WHERE id = 98",
        3: "SELECT name FROM item WHERE 2000 < date('now') AND id = 3",
        4: "SELECT 'item 4'",
        5: "SELECT name FROM item WHERE random() IS NOT NULL AND id = 5",
        6: "SELECT id FROM item LIMIT 6",
    }
    findings = found(source(tmp_path, golds))
    assert not findings.rejections and not findings.problems
    assert [(flag.line, flag.kind) for flag in findings.flags] == [
        (2, "no_rows"), (3, "nothing_found"), (4, "clock"), (5, "constant"), (6, "random"), (7, "arbitrary_rows"),
    ]  # fmt: skip
    assert str(findings.flags[0]).startswith(f"{tmp_path}/records.jsonl:2: no_rows (")
    assert sum(map(len, findings.splits.values())) == 40


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name FROM item ORDER BY random() LIMIT 1",
        "SELECT random()",
        "SELECT julianday('now')",
        "SELECT CURRENT_TIMESTAMP",  # which counts seconds: the second run comes a second later
        "SELECT strftime('%s', 'now') FROM item WHERE id = 1",
    ],
)
def test_a_gold_query_that_differs_from_itself_is_refused(tmp_path: Path, sql: str) -> None:
    findings = found(source(tmp_path, {7: sql}))
    assert [(item.candidate.line, item.reason) for item in findings.rejections] == [(8, "gold_unstable")]
    assert "another result each time" in findings.rejections[0].detail
    assert "gold_unstable" in FAULTS and findings.sources[0].faulty == 1


def test_all_clocks_of_a_source_wait_for_one_second_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("finetune.data.golds.time.sleep", waited.append)
    golds = {n: f"SELECT name FROM item WHERE id = {n} AND date('now') > 'a{n}'" for n in range(5)}
    found(source(tmp_path, golds))
    assert sum(seconds > 0.1 for seconds in waited) == 1


def test_the_clock_and_chance_are_flagged_also_where_no_database_is_at_hand(tmp_path: Path) -> None:
    golds = {1: "SELECT NOW()", 2: "SELECT name FROM item ORDER BY RANDOM()"}
    lines = [row(n, dialect="postgres", **({"sql": golds[n]} if n in golds else {})) for n in range(20)]
    findings = found(jsonl_source(write_jsonl(tmp_path / "records.jsonl", lines)))
    assert [(flag.line, flag.kind) for flag in findings.flags] == [(2, "clock"), (3, "random")]


def test_gold_of_paraphrases_runs_once_and_once_more_to_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = executed(monkeypatch)
    gold = "SELECT name FROM item WHERE id = 1"
    found(source(tmp_path, dict.fromkeys(range(5), gold)))
    assert ran.count(gold) == 2


def test_a_database_without_rows_is_named_in_one_line_and_fails_the_check(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = source(tmp_path, {1: "SELECT COUNT(*) FROM item"}, items=0)
    values: dict[str, Any] = {"kind": "jsonl", "path": section.path, "databases": section.databases}
    config = tiny_config(data={"sources": [values], "val_fraction": 0.2, "test_fraction": 0.2})
    assert cli.main(["data", "check", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "db_id shop: every gold query of its 40 records is hollow (39 no_rows, 1 nothing_found), so any score on it says "
        "nothing; is the database filled?"
    )
    held_out = [int(count) for count in re.findall(r"(\d+) (?:val|test)", lines[1])]
    apart = re.findall(
        r"(\d+) (?:no_rows|nothing_found)", lines[1].partition("scored apart for their gold queries: ")[2]
    )
    assert "0 rejected;" in lines[1] and sum(map(int, apart)) == sum(held_out) > 0, (
        "what is only trained on is not scored"
    )
    assert len(lines) == 2


def test_a_few_hollow_gold_queries_are_listed_and_do_not_fail_the_check(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = source(tmp_path, {1: "SELECT 1 WHERE 1 = 0"})
    values: dict[str, Any] = {"kind": "jsonl", "path": section.path, "databases": section.databases}
    config = tiny_config(data={"sources": [values], "val_fraction": 0.2, "test_fraction": 0.2})
    assert cli.main(["data", "check", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "1 no_rows" in printed and "0 rejected" in printed


def test_records_to_train_on_are_counted_and_those_to_score_listed(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = source(tmp_path, {n: f"SELECT name FROM item WHERE id = -{n + 1}" for n in range(0, 40, 2)})
    values: dict[str, Any] = {"kind": "jsonl", "path": section.path, "databases": section.databases}
    config = tiny_config(data={"sources": [values], "val_fraction": 0.2, "test_fraction": 0.2})
    assert cli.main(["data", "check", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [counted] = [line for line in lines if line.startswith("to train on, and used: ")]
    listed = [line for line in lines if re.search(r":\d+: no_rows \((val|test)\): ", line)]
    assert listed and not any("(train)" in line for line in lines)
    assert counted == f"to train on, and used: {20 - len(listed)} no_rows (--json lists them)"
    assert lines[-1].endswith(f"scored apart for their gold queries: {len(listed)} no_rows")


def test_prepare_says_how_many_held_out_gold_queries_are_hollow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = source(tmp_path, {n: f"SELECT name FROM item WHERE id = {n + 100}" for n in range(40)})
    run_prepare([section], tmp_path / "prepared")
    assert "gold queries of val and test that say little about an answer" in capsys.readouterr().err
    run_prepare([source(tmp_path)], tmp_path / "prepared")
    assert capsys.readouterr().err == ""


def test_a_table_that_is_empty_is_named_by_the_examination(tmp_path: Path) -> None:
    folder = tmp_path / "databases"
    with sqlite3.connect(make_database(folder, items=40)) as connection:
        connection.execute("CREATE TABLE sale (item INTEGER)")
    gold = {"sql": "SELECT name FROM item WHERE id NOT IN (SELECT item FROM sale)"}
    schema = SCHEMA + "\nCREATE TABLE sale (item INTEGER);"
    lines = [row(number, schema=schema, **(gold if number == 3 else {})) for number in range(40)]
    findings = found(jsonl_source(write_jsonl(tmp_path / "records.jsonl", lines), databases=str(folder)))
    assert [(flag.line, flag.kind) for flag in findings.flags] == [(4, "empty_table")]
    assert Golds().changing(1.0) == set()


def test_what_has_no_database_is_not_said_to_be_scored_apart(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(
        tmp_path / "records.jsonl", [row(n, dialect="postgres", sql=f"SELECT NOW(), {n}") for n in range(20)]
    )
    sources = [{"kind": "jsonl", "path": str(path)}]
    config = tiny_config(data={"sources": sources, "val_fraction": 0.2, "test_fraction": 0.2})
    assert cli.main(["data", "check", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "to train on, and used", "held out, and not scored for lack of a database",
    ]  # fmt: skip
    assert lines[-1].endswith("0 rejected")
    assert cli.main(["data", "prepare", str(config)]) == 0
    printed = capsys.readouterr()
    assert "scored apart" not in printed.out + printed.err
