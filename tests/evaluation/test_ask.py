"""`finetune generate`: one question gives the SQL and, on request, its rows."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.data.prompts import PromptTemplate
from finetune.evaluation.ask import ROWS_SHOWN, schema_of
from finetune.evaluation.generators import hf
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.hf import generate_answers
from finetune.models.adapter import seal_adapter
from finetune.models.device import choose_device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.run_folder import RunFolder
from tests.helpers.data_examples import SCHEMA, make_database
from tests.helpers.errors import reported
from tests.helpers.run_examples import copy_run

QUESTION = "How many items cost more than 3 euros?"


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without progress bars, stderr holds only our own messages."""
    monkeypatch.setattr("transformers.core_model_loading.tqdm", lambda items, **_: items)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return copy_run(tiny_run, tmp_path / "runs")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return make_database(tmp_path / "databases", items=60)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """answer("SELECT ..."): makes a fake model answer so; returns the list of prompts that it receives."""

    def play(text: str) -> list[str]:
        prompts: list[str] = []

        def say(model: Any, tokenizer: Any, asked: Sequence[str], **_: Any) -> list[tuple[str, int]]:
            prompts.extend(asked)
            return [(text, 5)] * len(asked)

        monkeypatch.setattr(hf, "generate_answers", say)
        for name in ("load_base", "load_adapter", "load_tokenizer"):
            monkeypatch.setattr(hf, name, lambda *_, **__: None)
        return prompts

    return play


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the arguments has to be found before minutes are spent on loading a model."""
    monkeypatch.setattr(hf, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))


def generate(run: RunFolder, database: Path, *more: str, question: str = QUESTION) -> int:
    return cli.main(["generate", str(run.path), "--db", str(database), *more, question])


# the question


def test_the_tuned_model_answers_or_on_request_the_base_model(
    run: RunFolder, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run.config()
    prompt, tokenizer = PromptTemplate().render(schema=SCHEMA, question=QUESTION), load_tokenizer(config.model)
    model = load_base(config.model, config.quantization, choose_device("auto"))
    settings: dict[str, Any] = {"batch_size": 1, "max_new_tokens": 16, "progress": False}
    expected = [generate_answers(model, tokenizer, [prompt], **settings)]
    expected.insert(0, generate_answers(load_adapter(model, run.adapter), tokenizer, [prompt], **settings))
    heard = []

    def listen(*arguments: Any, **more: Any) -> list[Answer]:
        heard.append(generate_answers(*arguments, **more))
        return heard[-1]

    monkeypatch.setattr(hf, "generate_answers", listen)
    generate(run, database)
    generate(run, database, "--base")
    assert heard == expected and heard[0] != heard[1]


def test_the_prompt_shows_schema_question_and_evidence(run: RunFolder, database: Path, answer: Any) -> None:
    prompts = answer("SELECT 1")
    assert generate(run, database, "--evidence", "Dear means more than 3 euros.") == 0
    expected = PromptTemplate().render(schema=SCHEMA, question=QUESTION, evidence="Dear means more than 3 euros.")
    assert prompts == [expected]


def test_a_compact_template_is_taken_from_beside_the_adapter(run: RunFolder, database: Path, answer: Any) -> None:
    prompts = answer("SELECT 1")
    PromptTemplate("compact").save(run.adapter)
    seal_adapter(run.adapter)
    assert generate(run, database) == 0
    assert "item(id, name, price)" in prompts[0] and "CREATE TABLE" not in prompts[0]


def test_only_the_sql_of_an_answer_is_printed(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer("Here it is:\n```sql\nSELECT name\nFROM item;\n```\nBye.")
    assert generate(run, database) == 0
    assert capsys.readouterr().out == "SELECT name FROM item\n"


@pytest.mark.parametrize(
    ("most", "text", "cut"), [("5", "SELECT a, a", True), ("6", "SELECT a, a", False), ("5", "SELECT 1;", False)]
)
def test_an_answer_that_is_cut_off_says_so(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str], most: str, text: str, cut: bool
) -> None:
    """The fake model's answers have five tokens."""
    answer(text)
    assert generate(run, database, "--max-new-tokens", most) == 0
    said = capsys.readouterr()
    assert said.out == f"{text.rstrip(';')}\n"
    assert ("cut off at 5 tokens" in said.err) == cut and (said.err == "") != cut


def test_the_model_stops_at_the_wanted_number_of_tokens(
    run: RunFolder, database: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("SELECT 1")
    most: list[int] = []

    def listen(*_: Any, max_new_tokens: int, **__: Any) -> list[tuple[str, int]]:
        most.append(max_new_tokens)
        return [("SELECT 1", 2)]

    monkeypatch.setattr(hf, "generate_answers", listen)
    generate(run, database)
    generate(run, database, "--max-new-tokens", "7")
    assert most == [run.config().evaluation.max_new_tokens, 7]


def test_an_answer_without_sql_is_an_error(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(" \n")
    with reported("ask.no_sql"):
        assert generate(run, database) == 2
    assert capsys.readouterr() == ("", "finetune: the model answered without SQL: ''\n")


# the schema


def test_a_schema_file_gives_the_prompt_that_its_database_gives(
    run: RunFolder, database: Path, tmp_path: Path, answer: Any
) -> None:
    prompts = answer("SELECT 1")
    script = tmp_path / "shop.SQL"
    script.write_text(
        "-- the shop\nPRAGMA foreign_keys = ON;\nCREATE TABLE item (\n  id INTEGER PRIMARY KEY, -- number\n"
        "  name TEXT,\n  price REAL\n);\nINSERT INTO item VALUES (1, 'a; b', 2.0);\nCREATE INDEX i ON item (name);\n"
    )
    assert generate(run, database) == generate(run, script) == 0
    assert prompts[0] == prompts[1]


def test_a_schema_file_keeps_all_its_tables_in_order(tmp_path: Path) -> None:
    path = tmp_path / "two.sql"
    path.write_text("CREATE TABLE b (id INTEGER);\ncreate table if not exists a (b_id INTEGER REFERENCES b(id))")
    assert schema_of(path).splitlines() == [
        "CREATE TABLE b (id INTEGER);",
        "create table if not exists a (b_id INTEGER REFERENCES b(id))",
    ]


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("missing.sqlite", None, "sql.database_missing", ""),
        ("missing.sql", None, "file.unreadable", "not readable as text"),
        ("folder.sqlite", "folder", "sql.database_missing", ""),
        ("text.sqlite", b"not a database at all", "sql.database_corrupt", ""),
        ("empty.sqlite", b"", "sql.database_corrupt", ""),
        ("damaged.sqlite", b"SQLite format 3\x00" + b"junk" * 300, "sql.database_corrupt", ""),
        ("empty.sql", b"", "sql.no_tables", "no CREATE TABLE statement in it"),
        ("comment.sql", b"-- CREATE TABLE item (id INTEGER);\n", "sql.no_tables", ""),
        ("rows.sql", b"INSERT INTO item VALUES (1);", "sql.no_tables", ""),
        ("broken.sql", b"CREATE TABLE item (id INTEGER", "sql.bad_schema", "schema: "),
        ("bytes.sql", b"CREATE TABLE \xff\xfe (id INTEGER);", "file.unreadable", ""),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_database_or_schema_that_cannot_be_read_is_one_line_that_names_it(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, code: str, said: str
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with reported(code):
        assert generate(run, path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"finetune: {path}: ") and said in err


def test_a_database_without_tables_is_refused(
    run: RunFolder, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(tmp_path / "bare.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    with reported("sql.no_tables"):
        assert generate(run, tmp_path / "bare.sqlite") == 2
    assert "bare.sqlite" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(
    run: RunFolder, database: Path, no_model: None, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    with reported("ask.empty_question"):
        assert generate(run, database, question=question) == 2
    assert capsys.readouterr().err == "finetune: the question is empty\n"


def test_a_run_without_adapter_is_refused(
    run: RunFolder, database: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.adapter)
    with reported("adapter.missing"):
        assert generate(run, database) == 2
    assert capsys.readouterr().err.startswith(f"finetune: {run.adapter}: ")


def test_a_folder_that_is_no_run_is_refused_with_the_runs_beside_it(
    run: RunFolder, database: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("run.not_found"):
        assert generate(RunFolder(run.path.parent / "other"), database) == 2
    assert capsys.readouterr().err.startswith(f"finetune: {run.path.parent / 'other'}: ")


# the rows


def rows_of(out: str) -> list[str]:
    return out.splitlines()[1:]


def test_run_prints_the_rows_in_aligned_columns(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer("SELECT name AS what, price, NULL AS absent, CAST('x' AS BLOB) AS raw FROM item WHERE id IN (1, 10)")
    assert generate(run, database, "--run") == 0
    assert rows_of(capsys.readouterr().out) == [
        "what     price  absent  raw",
        "-------  -----  ------  ----",
        "item 1   1.5    NULL    b'x'",
        "item 10  15.0   NULL    b'x'",
        "(2 rows)",
    ]


@pytest.mark.parametrize(
    ("sql", "shown", "last"),
    [
        ("SELECT name FROM item WHERE id = 99", 0, "(0 rows)"),
        ("SELECT name FROM item WHERE id = 1", 1, "(1 row)"),
        (f"SELECT name FROM item WHERE id < {ROWS_SHOWN}", ROWS_SHOWN, f"({ROWS_SHOWN} rows)"),
        ("SELECT name FROM item", ROWS_SHOWN, f"(60 rows, {60 - ROWS_SHOWN} not shown)"),
    ],
)
def test_long_results_are_cut_and_say_so(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str], sql: str, shown: int, last: str
) -> None:
    answer(sql)
    assert generate(run, database, "--run") == 0
    header, line, *rows, count = rows_of(capsys.readouterr().out)
    assert (header, set(line), len(rows), count) == ("name", {"-"}, shown, last)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT title FROM item", "the SQL does not run: no such column: title"),
        ("DROP TABLE item", "the SQL does not run: changing the schema is not allowed: a query may only read"),
        ("DELETE FROM item", "the SQL does not run: DELETE is not allowed: a query may only read"),
    ],
)
def test_sql_that_does_not_run_is_printed_and_is_an_error(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str], sql: str, said: str
) -> None:
    before = database.read_bytes()
    answer(sql)
    with reported("ask.sql_failed"):
        assert generate(run, database, "--run") == 2
    assert capsys.readouterr() == (f"{sql}\n", f"finetune: {said}\n")
    assert database.read_bytes() == before


def test_sql_that_runs_too_long_is_stopped_at_the_configs_timeout(
    tiny_run: Path, tmp_path: Path, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", evaluation={"timeout_seconds": 0.2})
    answer("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n")
    with reported("ask.sql_failed"):
        assert generate(run, database, "--run") == 2
    assert "no answer within 0.2 seconds" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_schema_has_no_rows_to_run_on(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shop.sql"
    path.write_text(SCHEMA)
    with reported("cli.conflicting_options"):
        assert generate(run, path, "--run") == 2
    assert capsys.readouterr() == (
        "", f"finetune: {path}: a schema has no rows; give a SQLite file to --db to use --run\n"
    )  # fmt: skip


# the dialect


def trained_on(run: RunFolder, *dialects: str) -> RunFolder:
    PromptTemplate(dialects=dialects).save(run.adapter)
    seal_adapter(run.adapter)
    return run


def schema_file(tmp_path: Path, text: str = SCHEMA) -> Path:
    path = tmp_path / "shop.sql"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("dialects", "option", "asked"),
    [
        ((), (), "sqlite"),
        (("postgres",), (), "postgres"),
        (("postgres", "mysql"), (), "postgres"),
        (("postgres",), ("--dialect", "MySQL"), "mysql"),
        (("postgres",), ("--dialect", "T-SQL"), "tsql"),
        ((), ("--dialect", "pgsql"), "postgres"),
        (("mysql", "sqlite"), (), "mysql"),
    ],
)
def test_a_question_is_asked_in_the_dialect_of_the_runs_data(
    run: RunFolder, tmp_path: Path, answer: Any, dialects: tuple[str, ...], option: tuple[str, ...], asked: str
) -> None:
    prompts = answer("SELECT 1")
    assert generate(trained_on(run, *dialects), schema_file(tmp_path), *option) == 0
    assert prompts[0].startswith(f"### {asked} schema\nCREATE TABLE item")


def test_a_run_of_an_earlier_version_takes_the_dialect_of_its_sources(
    tiny_run: Path, tmp_path: Path, answer: Any
) -> None:
    source = {"kind": "jsonl", "path": "x.jsonl", "dialect": "Postgres"}
    run = copy_run(tiny_run, tmp_path / "runs", data={"sources": [source]})
    prompts = answer("SELECT 1")
    assert generate(run, schema_file(tmp_path)) == 0
    assert prompts[0].startswith("### postgres schema\n")


def test_a_database_is_asked_in_its_own_dialect_if_the_run_knows_it(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = answer("SELECT 1 AS one")
    assert generate(trained_on(run, "mysql", "sqlite"), database, "--run") == 0
    assert prompts[0].startswith("### sqlite schema\n") and "(1 row)" in capsys.readouterr().out


@pytest.mark.parametrize("schema_format", ["ddl", "compact"])
@pytest.mark.parametrize("dialect", ["sqlite", "postgres", "bigquery"])
def test_a_column_type_that_sqlite_does_not_know_is_no_error(
    run: RunFolder, tmp_path: Path, answer: Any, schema_format: Any, dialect: str
) -> None:
    ddl = "CREATE TABLE t (id uuid DEFAULT gen_random_uuid(), tags text[], at timestamptz, n numeric(3, 1) NOT NULL);"
    PromptTemplate(schema_format, dialects=(dialect,)).save(run.adapter)
    seal_adapter(run.adapter)
    prompts = answer("SELECT 1")
    assert generate(run, schema_file(tmp_path, ddl)) == 0
    shown = "t(id, tags, at, n)" if schema_format == "compact" else "gen_random_uuid()"
    assert prompts[0].startswith(f"### {dialect} schema\n") and shown in prompts[0]


def test_the_answer_is_read_by_the_rules_of_its_dialect(
    run: RunFolder, tmp_path: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(r"SELECT id FROM item WHERE name = 'it\'s -- late; x';")
    assert generate(run, schema_file(tmp_path), "--dialect", "mysql") == 0
    assert capsys.readouterr().out == r"SELECT id FROM item WHERE name = 'it\'s -- late; x'" + "\n"


@pytest.mark.usefixtures("no_model")
def test_a_dialect_without_an_engine_cannot_be_run(
    run: RunFolder, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("ask.no_engine"):
        assert generate(trained_on(run, "postgres"), database, "--run") == 2
    assert capsys.readouterr().err.startswith(f"finetune: --run: {database} cannot run postgres; ")


@pytest.mark.usefixtures("no_model")
def test_an_unknown_dialect_is_refused(run: RunFolder, database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reported("sql.unknown_dialect"):
        assert generate(run, database, "--dialect", "postgrs") == 2
    assert "did you mean postgres?" in capsys.readouterr().err


# what cannot be answered, and what is printed


def test_a_generator_that_gives_up_on_a_prompt_is_one_line(
    run: RunFolder, database: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    answer("")
    monkeypatch.setattr(hf, "generate_answers", lambda *_, **__: [("", 0, "failed", 12)])
    with reported("ask.failed"):
        assert generate(run, database) == 2


@pytest.mark.parametrize(("problem", "code"), [("too_long", "ask.too_long"), ("out_of_memory", "ask.out_of_memory")])
def test_a_prompt_that_is_too_long_is_one_line(
    run: RunFolder, database: Path, monkeypatch: pytest.MonkeyPatch, answer: Any,
    capsys: pytest.CaptureFixture[str], problem: str, code: str,
) -> None:  # fmt: skip
    answer("")
    monkeypatch.setattr(hf, "generate_answers", lambda *_, **__: [("", 0, problem, 34200)])
    with reported(code):
        assert generate(run, database) == 2
    assert "34200 tokens" in capsys.readouterr().err


def test_more_new_tokens_than_the_model_has_positions_are_one_line(
    run: RunFolder, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("ask.too_long"):
        assert generate(run, database, "--max-new-tokens", "100000") == 2
    assert "no room for an answer of 100000 in the model's positions; lower --max-new-tokens" in capsys.readouterr().err


def test_control_characters_of_a_database_or_an_answer_are_printed_as_escapes(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer("SELECT 'a\x1b[31m' || char(27, 155, 13, 8238, 10, 9) || 'b' AS \"x\u202ey\x07\"")
    assert generate(run, database, "--run") == 0
    sql, header, _, line, count = capsys.readouterr().out.split("\n")[:5]
    assert "\\x1b[31m" in sql and "\\u202e" in sql and "\\x07" in sql
    assert header == "x\\u202ey\\x07"
    assert line == "a\\x1b[31m\\x1b\\x9b\\r\\u202e\\n\\tb" and count == "(1 row)"


def test_control_characters_in_a_message_are_printed_as_escapes(
    run: RunFolder, database: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer('SELECT "a" FROM "b\x1b]0;title\x07"')
    with reported("ask.sql_failed"):
        assert generate(run, database, "--run") == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b]0;title\\x07" in err
