"""The data set shipped in data/: what data/README.md states about it, checked on a fresh build."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlglot import exp, parse_one

from finetune.sql.column_references import columns_not_shown
from finetune.sql.difficulty import difficulty

DATA = Path(__file__).resolve().parents[2] / "data"
TRAINED = {"bike_shop", "clinic", "library", "film_club", "cargo_line", "school"}
UNSEEN = "farm_market"
EVERY = TRAINED | {UNSEEN}
SPLITS = ("train", "val", "test")
Records = list[dict[str, str]]
Databases = dict[str, sqlite3.Connection]


def load_builder() -> Any:
    """data/build.py as a module; its folder is not a package, and "build" is the name of a package on PyPI."""
    sys.path.insert(0, str(DATA))
    try:
        spec = importlib.util.spec_from_file_location("shipped_data_build", DATA / "build.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DATA))
    return module


builder = load_builder()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("shipped") / "built"
    builder.build(out)
    return out


@pytest.fixture(scope="session")
def splits(built: Path) -> dict[str, Records]:
    return {split: read_jsonl(built / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="session")
def records(splits: dict[str, Records]) -> Records:
    return [record for split in SPLITS for record in splits[split]]


@pytest.fixture(scope="session")
def databases(built: Path) -> Iterator[Databases]:
    opened = {path.parent.name: sqlite3.connect(path) for path in built.glob("databases/*/*.sqlite")}
    yield opened
    for connection in opened.values():
        connection.close()


def read_jsonl(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def tree_of(sql: str) -> exp.Expr:
    return parse_one(sql, "sqlite")


@cache
def level_of(sql: str) -> str:
    return difficulty(sql)


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


def family_of(record: dict[str, str]) -> str:
    return record["id"].rpartition("-")[0]


def families(db_id: str) -> list[Any]:
    found: list[Any] = builder.read_families(DATA / "databases" / db_id)
    return found


# What the set holds


def test_there_are_enough_questions_in_each_split(splits: dict[str, Records]) -> None:
    assert sum(len(part) for part in splits.values()) >= 1_200
    assert 1_800 <= len(splits["train"]) <= 2_200
    assert 80 <= len(splits["val"]) <= 120
    assert 220 <= len(splits["test"]) <= 270


def test_each_database_has_its_share_of_each_split(splits: dict[str, Records]) -> None:
    counts = {split: Counter(record["db_id"] for record in part) for split, part in splits.items()}
    assert set(counts["train"]) == set(counts["val"]) == TRAINED
    assert min(counts["train"].values()) >= 250
    assert min(counts["val"].values()) >= 10
    assert min(counts["test"].values()) >= 20


def test_the_unseen_database_is_in_the_test_split_only(splits: dict[str, Records]) -> None:
    where = {split for split, part in splits.items() for record in part if record["db_id"] == UNSEEN}
    assert where == {"test"}
    assert 50 <= sum(record["db_id"] == UNSEEN for record in splits["test"]) <= 80


def test_each_database_has_many_families_asked_in_several_ways() -> None:
    for db_id in EVERY:
        assert len(families(db_id)) >= 35, db_id
        few = [family.name for family in families(db_id) if len(family.ask) < 2]
        assert not few, f"{db_id}: one phrasing only in {few}"


def test_the_readme_counts_what_is_there(splits: dict[str, Records]) -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    counted = {split: Counter(record["db_id"] for record in part) for split, part in splits.items()}
    rows = {db_id: [len(families(db_id)), *(counted[s][db_id] for s in SPLITS)] for db_id in EVERY}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, numbers in rows.items():
        assert f"| {name} | {' | '.join(map(str, numbers))} |" in readme
    trained_on = {family_of(record) for record in splits["train"]}
    known = [family_of(r) in trained_on for r in splits["test"] if r["db_id"] != UNSEEN]
    assert f"Of the other {len(known)} test questions, {sum(known)} belong" in readme


def test_records_have_the_fields_of_the_contract(splits: dict[str, Records]) -> None:
    for split, part in splits.items():
        for record in part:
            assert set(record) == {"id", "db_id", "question", "sql", "schema", "dialect", "split"}
            assert record["split"] == split and record["dialect"] == "sqlite"
            assert record["schema"].startswith("CREATE TABLE")


def test_training_sees_paraphrases_of_the_same_sql(splits: dict[str, Records]) -> None:
    golds = Counter((record["db_id"], record["sql"]) for record in splits["train"])
    assert sum(count >= 2 for count in golds.values()) > 0.95 * len(golds)


def test_a_prefix_of_the_training_file_is_a_sample_of_the_whole(splits: dict[str, Records]) -> None:
    whole, prefix = splits["train"], splits["train"][:700]
    for kind in (lambda record: record["db_id"], lambda record: level_of(record["sql"])):
        expected, found = Counter(map(kind, whole)), Counter(map(kind, prefix))
        for key, count in expected.items():
            assert found[key] / len(prefix) == pytest.approx(count / len(whole), abs=0.04), key


def test_difficulties_are_mixed(splits: dict[str, Records]) -> None:
    for split in ("train", "test"):
        counts = Counter(level_of(record["sql"]) for record in splits[split])
        share = {label: count / len(splits[split]) for label, count in counts.items()}
        assert 0.30 <= share["easy"] <= 0.42, share
        assert 0.30 <= share["medium"] <= 0.45, share
        assert 0.14 <= share["hard"] <= 0.25, share
        assert 0.05 <= share["extra"] <= 0.15, share


FEATURES: dict[str, Callable[[exp.Expr], Any]] = {
    "filter": lambda q: q.find(exp.Where),
    "two conditions": lambda q: q.find(exp.And),
    "join of two": lambda q: len(q.args.get("joins") or []) == 1,
    "join of three": lambda q: len(q.args.get("joins") or []) == 2,
    "left join": lambda q: any(join.side == "LEFT" for join in q.find_all(exp.Join)),
    "group by": lambda q: q.find(exp.Group),
    "having": lambda q: q.find(exp.Having),
    "in sub-query": lambda q: any(i.args.get("query") and not negated(i) for i in q.find_all(exp.In)),
    "not in sub-query": lambda q: any(i.args.get("query") and negated(i) for i in q.find_all(exp.In)),
    "compared with an average": lambda q: any(
        compared.expression.find(exp.Avg) for compared in q.find_all(exp.GT, exp.LT)
    ),
    "strftime": lambda q: "strftime" in q.sql("sqlite").casefold(),
    "between dates": lambda q: any("-" in b.args["low"].name for b in q.find_all(exp.Between)),
    "between numbers": lambda q: any(b.args["low"].is_int for b in q.find_all(exp.Between)),
    "date compared": lambda q: any(
        re.fullmatch(r"\d{4}-\d\d-\d\d", c.expression.name) for c in q.find_all(exp.GT, exp.GTE, exp.LT)
    ),
    "is null": lambda q: any(not negated(found) for found in q.find_all(exp.Is)),
    "is not null": lambda q: any(negated(found) for found in q.find_all(exp.Is)),
    "like": lambda q: q.find(exp.Like),
    "order by": lambda q: q.args.get("order") and not q.args.get("limit"),
    "limit": lambda q: q.args.get("limit"),
    "distinct": lambda q: q.args.get("distinct"),
    "count": lambda q: q.find(exp.Count),
    "count distinct": lambda q: any(count.find(exp.Distinct) for count in q.find_all(exp.Count)),
    "min": lambda q: q.find(exp.Min),
    "max": lambda q: q.find(exp.Max),
    "avg": lambda q: q.find(exp.Avg),
    "sum": lambda q: q.find(exp.Sum),
    "union": lambda q: isinstance(q, exp.Union),
    "except": lambda q: isinstance(q, exp.Except),
    "intersect": lambda q: isinstance(q, exp.Intersect),
}


def negated(part: exp.Expr) -> bool:
    return isinstance(part.parent, exp.Not)


def test_every_listed_feature_of_sql_occurs(splits: dict[str, Records]) -> None:
    found: Counter[str] = Counter()
    for sql in {record["sql"] for record in splits["train"]}:
        tree = tree_of(sql)
        found.update(name for name, has in FEATURES.items() if has(tree))
    assert {name: found[name] for name in FEATURES if found[name] < 3} == {}


# What the golds do


def test_every_gold_runs_and_nearly_all_return_rows(records: Records, databases: Databases) -> None:
    golds = {(record["db_id"], record["sql"]) for record in records}
    empty = [sql for db_id, sql in golds if not databases[db_id].execute(sql).fetchall()]
    assert len(empty) <= 0.05 * len(golds), empty


def test_no_gold_would_be_rejected_for_its_columns_without_a_database(records: Records) -> None:
    golds = {(record["sql"], record["schema"]) for record in records}
    assert len(golds) > 1000
    assert [sql for sql, schema in golds if columns_not_shown(sql, schema, "sqlite")] == []


def test_no_tie_decides_the_order_or_the_cut_of_a_gold(records: Records, databases: Databases) -> None:
    ordered = {(r["db_id"], r["sql"]) for r in records if "ORDER BY" in r["sql"]}
    assert len(ordered) > 50
    for db_id, sql in ordered:
        query = tree_of(sql).copy()
        keys = [key.this.copy() for key in query.args["order"].expressions]
        limit = query.args.pop("limit", None)
        query.set("expressions", keys)
        ranked = databases[db_id].execute(query.sql("sqlite")).fetchall()
        decisive = ranked[: int(limit.expression.name) + 1] if limit else ranked
        assert len(set(decisive)) == len(decisive), sql
        assert not any(None in row for row in decisive), sql


def test_a_question_says_the_order_that_its_gold_has(records: Records) -> None:
    words = re.compile(r"first|on top|from .+ to |sort|order|rising|falling|starting with", re.IGNORECASE)
    for record in records:
        if re.search(r"ORDER BY", record["sql"]) and not record["sql"].endswith(" LIMIT 1"):
            assert words.search(record["question"]), record


def test_golds_share_one_style(records: Records) -> None:
    for sql in {record["sql"] for record in records}:
        assert not re.search(r'[";\n]| AS | ASC\b|  |<>', sql), sql
        bare = re.sub(r"'[^']*'", "", sql)
        assert not re.search(r"\b(select|from|where|group|order|join|and|in|not|between)\b", bare), sql
        assert all(re.fullmatch(r"(\w+)\.(\w+)_id = \2\.id", on) for on in joined_on(sql)), sql


def joined_on(sql: str) -> list[str]:
    return re.findall(r" ON (\S+ = \S+?)(?= |\)|$)", sql)


def test_columns_are_qualified_exactly_where_a_join_needs_it(records: Records) -> None:
    for sql in {record["sql"] for record in records}:
        for select in tree_of(sql).find_all(exp.Select):
            own = [column for column in select.find_all(exp.Column) if column.parent_select is select]
            assert {bool(column.table) for column in own} <= {bool(select.args.get("joins"))}, sql


def test_examples_are_short_enough_for_a_small_model(records: Records) -> None:
    lengths = sorted(len(record["question"]) + len(record["sql"]) for record in records)
    assert sum(lengths) / len(lengths) < 160
    assert lengths[-1] < 300


def test_questions_are_clean_english_on_the_surface(records: Records) -> None:
    for question in {record["question"] for record in records}:
        assert re.fullmatch(r"[A-Z].*[.?]", question) and "  " not in question, question
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouAEIOUh]|[{}]|\b1 [a-z]+s\b", question), question


# What keeps the score honest


def test_splits_share_no_question_and_no_gold(splits: dict[str, Records]) -> None:
    for field in ("question", "sql"):
        where = defaultdict(set)
        for split, part in splits.items():
            for record in part:
                where[normal(record[field])].add(split)
        assert [text for text, found in where.items() if len(found) > 1] == []


def test_ids_and_questions_are_unique(records: Records) -> None:
    assert len({record["id"] for record in records}) == len(records)
    assert len({normal(record["question"]) for record in records}) == len(records)


def test_two_builds_give_the_same_bytes_and_the_same_rows(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(DATA / "build.py"), "--out", str(tmp_path / "again")]
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "questions" in done.stdout
    for split in SPLITS:
        assert (tmp_path / "again" / f"{split}.jsonl").read_bytes() == (built / f"{split}.jsonl").read_bytes()
    for path in built.glob("databases/*/*.sqlite"):
        assert dump(path) == dump(tmp_path / "again" / path.relative_to(built))


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


# What happens to a broken source file

GOOD = "- {name: all, sql: SELECT name FROM bike, ask: [Name all bikes.]}\n"
BROKEN = {
    "sql that fails": (GOOD.replace("name FROM", "nome FROM"), "no such column: nome"),
    "a tie": (GOOD.replace("bike,", "bike ORDER BY stock,"), "a tie or a NULL"),
    "order in a sub-query": (
        GOOD.replace("bike,", "bike WHERE id IN (SELECT id FROM bike ORDER BY id),"),
        "end",
    ),
    "a slot without values": (
        GOOD.replace("[Name all bikes.]", "['{brand}?']"),
        "no values for the slot brand",
    ),
    "values that fail": (GOOD.replace("}\n", ", slots: {x: SELECT y FROM z}}\n"), "no such table: z"),
    "a family twice": (GOOD + GOOD, "2 families are called all"),
    "a gold twice": (GOOD + GOOD.replace("all", "each", 1).replace("all", "the"), "has the gold SQL of"),
    "a question twice": (GOOD.replace("[Name all bikes.]", "[Name all bikes., name  all bikes.]"), "repeats"),
    "no rows": (GOOD.replace("bike,", "bike WHERE id = 99,"), "0.0%"),
    "a missing key": ("- {name: all}\n", "name, sql and ask expected"),
    "no YAML": ("- {name: [\n", "questions.yaml"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_family_is_one_line_and_leaves_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = BROKEN[fault]
    source = shutil.copytree(DATA / "databases" / "bike_shop", tmp_path / "sources" / "bike_shop")
    (source / "questions.yaml").write_text(text)
    monkeypatch.setattr(builder, "SOURCES", tmp_path / "sources")
    assert builder.main(["--out", str(tmp_path / "out" / "built")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("row", ["49,99,1,2025-06-20,1", "49,1,1,,1", "1,1,1,2025-06-20,1", "49,1,1"])
def test_a_broken_table_is_one_line_and_leaves_nothing(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(DATA / "databases" / "bike_shop", tmp_path / "sources" / "bike_shop")
    with (source / "sale.csv").open("a") as file:
        file.write(row + "\n")
    monkeypatch.setattr(builder, "SOURCES", tmp_path / "sources")
    assert builder.main(["--out", str(tmp_path / "out" / "built")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bike_shop/sale.csv: ") and error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []
