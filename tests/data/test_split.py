"""Splits are stable, have about the requested sizes, and share nothing."""

import random
from pathlib import Path
from typing import Any

import pytest

from finetune.data.records import SPLITS, Record, Split
from finetune.data.split import assign_splits, question_key, sql_key, sql_skeleton, subsample
from tests.helpers.data_examples import jsonl_source, read_jsonl, row, run_prepare, write_jsonl
from tests.helpers.errors import raises


def paraphrases(count: int, seed: int = 0) -> list[Record]:
    """Records, many of which share a gold query and some of which share a question but not the gold query."""
    draw = random.Random(seed)
    return [
        Record(
            **row(
                i,
                sql=f"SELECT {draw.randrange(count // 3)}",
                question=f"Question {draw.randrange(2 * count)}?",
            )
        )
        for i in range(count)
    ]


def split(records: list[Record], **changes: Any) -> list[Split]:
    settings: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.2, "split_by": "question", "seed": 13}
    return assign_splits(records, **(settings | changes))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_splits_share_a_question_or_gold_sql(seed: int) -> None:
    records = paraphrases(600, seed)
    splits = split(records, seed=seed)
    for key in (question_key, sql_key):
        seen: dict[str, Split] = {}
        for record, name in zip(records, splits, strict=True):
            assert seen.setdefault(key(record), name) == name
    assert set(splits) == set(SPLITS)


def test_fractions_are_about_met() -> None:
    splits = split([Record(**row(number)) for number in range(3000)])
    assert abs(splits.count("test") / 3000 - 0.2) < 0.02
    assert abs(splits.count("val") / 3000 - 0.1) < 0.02


def test_new_records_move_no_old_ones_unless_they_join_groups() -> None:
    records = [Record(**row(number)) for number in range(300)]
    more = [Record(**row(number)) for number in range(300, 400)]
    assert split(records + more)[:300] == split(records)
    assert split(more + records)[100:] == split(records)


def test_another_seed_splits_differently() -> None:
    records = [Record(**row(number)) for number in range(300)]
    assert split(records, seed=1) != split(records, seed=2)


def test_split_by_database_keeps_each_database_whole() -> None:
    records = [Record(**row(number, db_id=f"db{number % 40}")) for number in range(400)]
    splits = split(records, split_by="database")
    by_database = {record.db_id: name for record, name in zip(records, splits, strict=True)}
    assert all(by_database[record.db_id] == name for record, name in zip(records, splits, strict=True))
    assert set(splits) == set(SPLITS)


def test_group_follows_a_record_given_to_train() -> None:
    records = [Record(**row(number, sql="SELECT 1")) for number in range(3)]
    given = [Record(**row(10, sql="SELECT 1", split="train"))]
    everything_to_test = {"test_fraction": 0.9, "val_fraction": 0.1}
    assert split(records, **everything_to_test) != ["train"] * 3
    assert split(records + given, **everything_to_test) == ["train"] * 4


@pytest.mark.parametrize("seed", range(10))
def test_group_follows_the_hash_of_its_first_member(seed: int) -> None:
    first = Record(**row(1))
    second = Record(**row(2))
    for one, other in ((first, second), (second, first)):
        link = Record(**row(3, sql=one.sql, question=other.question))
        assert split([first, second, link], seed=seed) == split([first], seed=seed) * 3


def test_records_of_a_given_test_set_join_no_groups() -> None:
    first = [Record(**row(number)) for number in range(50)]
    second = [Record(**row(100 + number)) for number in range(50)]
    links = [
        Record(**row(200 + number, sql=a.sql, question=b.question, split="test"))
        for number, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    assert split([*first, *second, *links])[:100] == split([*first, *second])


def test_given_test_set_stays_as_it_is(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    rows += [row(100 + number, sql=rows[number]["sql"], split="test") for number in range(5)]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    prepared = run_prepare([source], tmp_path / "prepared", test_fraction=0.0)
    assert [record.id for record in prepared.records("test")] == [f"r{100 + number}" for number in range(5)]
    assert prepared.manifest["rejected"] == {"leak": 5}


SAME_QUESTION = [
    # first question, its gold, second question, its gold, whether the second is a duplicate
    ("Which item?", "SELECT 1", "which  ITEM?", "select 1 -- x", True),
    ("Which item?", "SELECT 1", "Which item?", "SELECT 2", True),
    ("Who has grade A?", "SELECT 'A'", "Who has grade a?", "SELECT 'a'", False),
    (
        "Who has grade A?",
        'SELECT name FROM item WHERE name = "A"',
        "Who has grade a?",
        'SELECT name FROM item WHERE name = "a"',
        False,
    ),
    ("Who has code 'A1'?", "SELECT 'A1'", "Who has code 'a1'?", "SELECT 'a1'", False),
    ("Who has code “A1”?", "SELECT 1", "Who has code “a1”?", "SELECT 1", False),
    (
        "The pupils' names and the teachers' ids",
        "SELECT 1",
        "THE PUPILS' NAMES AND THE TEACHERS' IDS",
        "SELECT 1",
        True,
    ),
    ("List the names", "SELECT name FROM item", "list the names", "SELECT name FROM item AS i", True),
    ("Is it a or A?", "SELECT 'A'", "is it A or a?", "SELECT 'a' AS x", False),
    ("Who is May?", "SELECT 'May'", "who is may?", "SELECT 'June'", True),
    ("Straße?", "SELECT 1", "STRASSE?", "SELECT 1", True),
]


@pytest.mark.parametrize(("first", "gold", "second", "other_gold", "same"), SAME_QUESTION)
def test_case_alone_makes_no_duplicate_of_a_question_with_another_answer(
    tmp_path: Path, first: str, gold: str, second: str, other_gold: str, same: bool
) -> None:
    rows = [row(1, question=first, sql=gold, split="train"), row(2, question=second, sql=other_gold, split="train")]
    rows += [row(3, split="val"), row(4, split="test")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    prepared = run_prepare([source], tmp_path / "prepared")
    assert prepared.manifest["rejected"] == ({"duplicate_question": 1} if same else {})


def test_questions_about_values_of_another_case_may_stand_in_train_and_test() -> None:
    one = Record(**row(1, question="Who has 'A1' in the US?"))
    assert question_key(one) == "who has 'A1' in the us?"
    assert question_key(one) != question_key(Record(**row(2, question="Who has 'a1' in the US?")))


def test_gold_sql_is_compared_without_case_spaces_and_semicolon() -> None:
    def key(sql: str) -> str:
        return sql_key(Record(**row(1, sql=sql)))

    assert key("SELECT  Name ,id FROM item;") == key("select name, id\nfrom ITEM -- all")
    assert key("SELECT 'A'") != key("SELECT 'a'")
    assert key("SELECT 'name' FROM item") != key("SELECT name FROM item")


def test_skeleton_masks_literals_and_nothing_else() -> None:
    def skeleton(sql: str) -> str:
        return sql_skeleton(Record(**row(1, sql=sql)))

    assert skeleton("SELECT a FROM t WHERE b = 'x' LIMIT 3") == skeleton('select A from t where b = "y" limit 10')
    assert skeleton("SELECT 'é🎉', \"x\"") == skeleton("SELECT 'y', \"z\"")
    assert skeleton("SELECT `a b` FROM t") != skeleton("SELECT `c d` FROM t")
    assert skeleton("SELECT a FROM t WHERE b > 1") != skeleton("SELECT a FROM t WHERE b < 1")


def test_sample_of_train_grows_with_its_limit() -> None:
    records = [Record(**row(number)) for number in range(100)]
    assert subsample(records, 10, seed=1) < subsample(records, 30, seed=1)
    assert len(subsample(records, 30, seed=1)) == 30


GIVEN_SPLITS = {
    "question and database": (
        row(1, split="train"),
        row(9, question="WHICH item has number 1?", split="test"),
    ),
    "question elsewhere": (
        row(1, split="train"),
        row(9, question=row(1)["question"], db_id="depot", split="test"),
    ),
    "gold SQL": (row(1, split="train"), row(9, sql="select NAME from item where id=1;", split="test")),
    "val and test": (row(1, split="val"), row(9, sql=row(1)["sql"], split="test")),
}


@pytest.mark.parametrize("case", GIVEN_SPLITS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_leak_is_removed_from_the_split_of_lower_precedence(tmp_path: Path, case: str, turned: bool) -> None:
    weak, strong = GIVEN_SPLITS[case]
    rows = [weak, strong, row(2, split="train"), row(3, split="val"), row(4, split="test")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows[::-1] if turned else rows))
    prepared = run_prepare([source], tmp_path / "prepared")
    (rejected,) = read_jsonl(tmp_path / "prepared" / "rejected.jsonl")
    assert (rejected["reason"], rejected["record"]) == ("leak", weak)
    assert {record.id for record in prepared.records("test")} == {"r4", "r9"}


def test_split_by_database_leaves_no_database_in_two_splits(tmp_path: Path) -> None:
    rows = [row(n, db_id="shop", split="train") for n in (1, 2)] + [row(3, db_id="shop", split="test")]
    rows += [row(4, db_id="depot", split="train"), row(5, db_id="dock", split="val")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    manifest = run_prepare([source], tmp_path / "prepared", split_by="database").manifest
    assert manifest["records_per_database"] == {
        "train": {"depot": 1},
        "val": {"dock": 1},
        "test": {"shop": 1},
    }
    assert manifest["rejected"] == {"leak": 2}


def test_source_may_give_all_its_records_one_split(tmp_path: Path) -> None:
    names: list[Split] = ["train", "val", "test"]
    sources = []
    for number, name in enumerate(names):
        rows = [row(10 * number + n) for n in range(3)]
        sources.append(jsonl_source(write_jsonl(tmp_path / f"{name}.jsonl", rows), split=name))
    prepared = run_prepare(sources, tmp_path / "prepared")
    for number, name in enumerate(names):
        assert [record.id for record in prepared.records(name)] == [f"r{10 * number + n}" for n in range(3)]


def test_record_that_contradicts_the_split_of_its_source_stops(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [row(1), row(2, split="test")])
    with raises("data.refused", match=r"q\.jsonl:2: split: the record says 'test', but data\.sources\[0\]\.split says"):
        run_prepare([jsonl_source(path, split="train")], tmp_path / "prepared")


@pytest.mark.parametrize(
    ("empty", "rows"),
    [
        ("val", [row(1, split="train"), row(2, split="test")]),
        ("test", [row(1, split="train"), row(2, split="val")]),
        ("train", [row(1, split="val"), row(2, split="test")]),
    ],
)
def test_split_that_ends_up_empty_stops(tmp_path: Path, empty: str, rows: list[dict[str, Any]]) -> None:
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    with raises("data.refused", match=f"the split {empty} is empty"):
        run_prepare([source], tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_val_may_be_empty_if_nobody_asks_for_it(tmp_path: Path) -> None:
    rows = [row(1, split="train"), row(2, split="test")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows))
    prepared = run_prepare([source], tmp_path / "prepared", val_fraction=0.0)
    assert prepared.records("val") == []
