"""The prompt text is pinned; SQL is extracted leniently from answers; generation stops once the SQL is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.data import prompts
from finetune.data.prompts import (
    PromptTemplate,
    answer_is_complete,
    completion,
    encode_examples,
    encode_prompts,
    extract_sql,
    load_template,
)
from tests.helpers.errors import raises

DDL = """
CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE "song list" (id INTEGER, singer_id INT REFERENCES singer(singer_id), "{title}" INT);
"""

# rendering


def test_the_ddl_prompt_is_this_text() -> None:
    prompt = PromptTemplate().render(schema=DDL, question="  How many\n singers?  ", evidence=" singer = artist ")
    assert prompt == (
        "### sqlite schema\n"
        "CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT NOT NULL);\n"
        'CREATE TABLE "song list" (id INTEGER, singer_id INT REFERENCES singer(singer_id), "{title}" INT);\n'
        "### Hint\n"
        "singer = artist\n"
        "### Question\n"
        "How many singers?\n"
        "### SQL\n"
    )


def test_the_compact_prompt_is_this_text() -> None:
    prompt = PromptTemplate(schema_format="compact").render(schema=DDL, question="How many {singers}?")
    assert prompt == (
        "### sqlite schema\n"
        "singer(singer_id, name)\n"
        '"song list"(id, singer_id -> singer.singer_id, "{title}")\n'
        "### Question\n"
        "How many {singers}?\n"
        "### SQL\n"
    )


def test_the_prompt_names_the_dialect() -> None:
    prompt = PromptTemplate().render(schema="CREATE TABLE t (a INT)", question="q", dialect="postgres")
    assert prompt.startswith("### postgres schema\nCREATE TABLE t (a INT)\n")


@pytest.mark.parametrize("evidence", [None, "", " \n"])
def test_without_evidence_there_is_no_hint(evidence: str | None) -> None:
    assert "### Hint" not in PromptTemplate().render(schema="x", question="q", evidence=evidence)


# identity


def test_the_identity_is_pinned_so_that_a_changed_prompt_is_noticed() -> None:
    """If this fails, the prompt text has changed: change PROMPT_VERSION as well, then update this line."""
    assert prompts.PROMPT_VERSION == "1"
    assert PromptTemplate().identity() == "1-ddl-5bd0da2b"


@pytest.mark.parametrize("template", [PromptTemplate(), PromptTemplate(schema_format="compact")])
def test_a_saved_template_is_loaded_again(tmp_path: Path, template: PromptTemplate) -> None:
    template.save(tmp_path)
    assert load_template(tmp_path) == template


def test_the_dialects_of_the_training_records_travel_with_the_template(tmp_path: Path) -> None:
    PromptTemplate(dialects=("postgres", "mysql")).save(tmp_path)
    loaded = load_template(tmp_path)
    assert loaded.dialects == ("postgres", "mysql") and loaded.identity() == PromptTemplate().identity()


def test_a_template_of_sqlite_is_saved_as_in_earlier_versions(tmp_path: Path) -> None:
    PromptTemplate(dialects=("sqlite",)).save(tmp_path)
    assert json.loads((tmp_path / prompts.PROMPT_FILE).read_text()) == {
        "schema_format": "ddl", "version": "1", "identity": "1-ddl-5bd0da2b"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "dialect"),
    [
        (PromptTemplate().render(schema="CREATE TABLE t (a INT)", question="q", dialect="postgres"), "postgres"),
        ("### MySQL schema\n", "mysql"),
        ("### klingon schema\n", "sqlite"),
        ("What?", "sqlite"),
    ],
)
def test_a_prompt_names_its_dialect(prompt: str, dialect: str) -> None:
    assert prompts.prompt_dialect(prompt) == dialect


def test_the_format_of_the_schema_is_part_of_the_identity() -> None:
    assert PromptTemplate().identity() != PromptTemplate(schema_format="compact").identity()


@pytest.mark.parametrize("part", ["_SCHEMA", "_HINT", "_QUESTION"])
def test_a_template_whose_text_has_changed_since_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    PromptTemplate().save(tmp_path)
    monkeypatch.setattr(prompts, part, getattr(prompts, part) + "\n")
    with raises("prompt.mismatch", match=r"prompt\.json: the adapter was trained on prompt 1-ddl-"):
        load_template(tmp_path)


@pytest.mark.parametrize("change", [{"version": "0"}, {"schema_format": "compact"}, {"identity": None}])
def test_a_template_file_that_was_edited_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    PromptTemplate().save(tmp_path)
    path = tmp_path / prompts.PROMPT_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with raises("prompt.mismatch"):
        load_template(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"text"', "null"])
def test_a_template_file_that_is_broken_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / prompts.PROMPT_FILE).write_text(content)
    with raises("prompt.corrupt", match=r"prompt\.json: not a prompt file"):
        load_template(tmp_path)


def test_an_adapter_without_a_template_is_refused(tmp_path: Path) -> None:
    with raises("prompt.missing", match=r"prompt\.json: missing"):
        load_template(tmp_path)


# tokens


class CharTokenizer:
    """One id per character, 1 at the start if special tokens are requested, and 0 for the end of the text."""

    eos_token_id = 0

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        start = [1] if add_special_tokens else []
        return {"input_ids": [start + [ord(char) for char in text] for text in texts]}


def test_training_sees_the_very_ids_that_generation_starts_from_then_answer_and_end() -> None:
    prompts_, answers = ["ab", ""], ["c", "de"]
    encoded = encode_examples(CharTokenizer(), prompts_, answers)
    for tokens, prompt, answer in zip(encoded, encode_prompts(CharTokenizer(), prompts_), answers, strict=True):
        assert tokens.ids[: tokens.answer_start] == prompt
        assert tokens.ids[tokens.answer_start :] == [ord(char) for char in answer] + [0]
        assert tokens.answer_tokens == len(answer) + 1
    assert encode_examples(CharTokenizer(), [], []) == []
    assert encode_prompts(CharTokenizer(), []) == []


# what the model learns to answer


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT 1;", "SELECT 1"),
        ("SELECT 1 ; ;\n", "SELECT 1"),
        ("SELECT  a,\n\tb\nFROM t", "SELECT a, b FROM t"),
        ("SELECT a -- it's\nFROM t -- isn't", "SELECT a FROM t"),
        ("SELECT 1 /* one; 'two */ + 1", "SELECT 1 + 1"),
        (
            "SELECT 'a  b', \"c  d\" FROM t WHERE x = '--; '",
            "SELECT 'a  b', \"c  d\" FROM t WHERE x = '--; '",
        ),
        ("SELECT 'it''s  ;'", "SELECT 'it''s  ;'"),
        ("SELECT `a  --b` FROM t", "SELECT `a  --b` FROM t"),
        ("", ""),
    ],
)
def test_a_completion_is_one_line_of_sql_without_semicolon(sql: str, expected: str) -> None:
    assert completion(sql) == expected


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM t WHERE name = 'O''Brien; ### x'",
        "WITH a AS (SELECT 1) SELECT * FROM a -- and so on\n;",
        "SELECT 'two\n\nlines' FROM t",
    ],
)
def test_what_the_model_learns_is_what_is_read_back(sql: str) -> None:
    learned = completion(sql)
    assert extract_sql(learned) == learned
    assert extract_sql(learned + ";\n") == learned


# reading an answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # plain
        ("SELECT 1", "SELECT 1"),
        ("  \n select a\nfrom t ;", "select a from t"),
        ("SELECT 1; SELECT 2", "SELECT 1"),
        ("SELECT 1\n\nThis counts; it's easy.", "SELECT 1"),
        ("SELECT 1\n \t\nThis counts.", "SELECT 1"),
        ("SELECT 1\r\n\r\nThis counts.", "SELECT 1"),
        ("SELECT 1\n### Question\nAnother?\n### SQL\nSELECT 2", "SELECT 1"),
        ("WITH a AS (SELECT 1)\n\tSELECT *\nFROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
        ("(SELECT 1) UNION SELECT 2; x", "(SELECT 1) UNION SELECT 2"),
        ("", ""),
        (" \n", ""),
        (";", ""),
        # quotes and comments
        ("SELECT ';\n\n###' FROM t; x", "SELECT ';\n\n###' FROM t"),
        ('SELECT "a;b" FROM t; x', 'SELECT "a;b" FROM t'),
        ("SELECT `a;b` FROM t; x", "SELECT `a;b` FROM t"),
        ("SELECT 'it''s;' FROM t; x", "SELECT 'it''s;' FROM t"),
        ("SELECT a -- it's; first\nFROM t; x", "SELECT a FROM t"),
        ("SELECT a /* it's; */ FROM t; x", "SELECT a FROM t"),
        ("SELECT 'never closed; x", "SELECT 'never closed; x"),
        # fenced
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        ("```postgresql\nSELECT 1\n```", "SELECT 1"),
        ("```SQL SELECT 1```", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```SELECT\n1```", "SELECT 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("```sql\nWITH a AS (SELECT 1)\n\nSELECT *\n\n\nFROM a\n```", "WITH a AS (SELECT 1) SELECT * FROM a"),
        ("```sql\nSELECT 1\n```\n```sql\nSELECT 2\n```", "SELECT 1"),
        # with chatter
        ("Here's the query:\n\n```sql\nSELECT 1\n```\nIt's good.", "SELECT 1"),
        ("The query counts; so:\n\n```\nSELECT 1\n```", "SELECT 1"),
        ("Here is the query:\n\nSELECT 1;\nIt's good.", "SELECT 1"),
        ("SELECT 1;\n\nOr else:\n```sql\nSELECT 2\n```", "SELECT 1"),
    ],
)
def test_the_sql_is_found_in_an_answer(answer: str, expected: str) -> None:
    assert extract_sql(answer) == expected


@pytest.mark.parametrize(
    ("answer", "complete"),
    [
        ("SELECT 1", False),
        ("SELECT 1\n", False),
        ("SELECT 1;", True),
        ("SELECT 1\n\n", False),
        ("SELECT 1\n\nW", False),
        ("SELECT 1\n\nWe", True),
        ("SELECT 1\n###", True),
        ("SELECT ';", False),
        ("SELECT 1 -- a;", False),
        ("```sql\nSELECT 1\n\n", False),
        ("```sql\nSELECT 1\n```", True),
        ("```sql\nSELECT 1;", True),
        ("Here is the query;\n\n", False),
        ("Here is the query:\n\n```sql\nSELECT 1\n``", False),
        ("Here is the query:\n\n```sql\nSELECT 1\n```", True),
        ("", False),
    ],
)
def test_generation_stops_where_the_query_has_ended(answer: str, complete: bool) -> None:
    assert answer_is_complete(answer) is complete


PIECES = st.sampled_from(
    [
        "SELECT",
        "with",
        " ",
        "1",
        "a",
        ";",
        "\n",
        "\n\n",
        "###",
        "```",
        "`",
        "'",
        '"',
        "--",
        "/*",
        "*/",
        "sql",
        "\r",
        "x",
    ]
)
ANSWERS = st.lists(PIECES, max_size=12).map("".join)


@given(ANSWERS, ANSWERS)
@example("SELECT 1;", "```sql\nSELECT 2```")
@example("Here you are:\n\n", "```sql\nSELECT 2```")
@example("SELECT 1;``", "`")
@example("a\n", "\nSELECT 1")
def test_what_follows_a_complete_answer_changes_nothing(answer: str, suffix: str) -> None:
    if answer_is_complete(answer):
        assert answer_is_complete(answer + suffix)
        assert extract_sql(answer + suffix) == extract_sql(answer)


@given(ANSWERS)
def test_an_extracted_query_is_extracted_as_itself_and_has_no_ends(answer: str) -> None:
    sql = extract_sql(answer)
    assert sql == sql.strip()
    if sql.lower().startswith(("select ", "with ")) and "`" not in sql:
        assert extract_sql(sql) == sql


def test_a_version_with_a_line_end_is_still_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text(json.dumps({"schema_format": "ddl", "version": "1\n2", "identity": "x"}))
    with raises("prompt.mismatch", match=r"renders 1\\n2-ddl-"):
        load_template(tmp_path)
