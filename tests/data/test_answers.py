"""What is taken out of an answer; generation stops only where nothing more could change it."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.data.answers import MAX_CHARACTERS, AnswerReader, answer_is_complete, extract_sql, read_answer
from finetune.data.prompts import completion

Q = "SELECT name FROM singer WHERE age > 20"
FENCE = f"```sql\n{Q}\n```"

CASES = [
    # the fence beats prose
    (f"With this query we select the rows.\n\n{FENCE}", Q),
    (f"Select the names of singers with age over 20.\n```sql\n{Q};\n```\nDone.", Q),
    (f"Select all names\n\n{FENCE}", Q),
    (f"select names from the list\n\n```\n{Q}\n```", Q),
    (f"SELECT a is what we need, from t.\n{FENCE}", Q),
    (f"To answer this, select rows with age.\n\n{Q}\n\nThis is with x.", Q),
    ("With the schema above, we join.\nSELECT a FROM t", "SELECT a FROM t"),
    # a blank line does not end an open query
    ("WITH x AS (SELECT 1)\n\nSELECT * FROM x", "WITH x AS (SELECT 1) SELECT * FROM x"),
    ("WITH x AS (\n SELECT 1\n\n),\n\ny AS (SELECT 2)\n\nSELECT * FROM x, y\n\nThis is it.",
     "WITH x AS (SELECT 1), y AS (SELECT 2) SELECT * FROM x, y"),
    ("WITH RECURSIVE n(x) AS (SELECT 1)\n\nSELECT x FROM n", "WITH RECURSIVE n(x) AS (SELECT 1) SELECT x FROM n"),
    ("SELECT a,\n\nb FROM t", "SELECT a, b FROM t"),
    ("SELECT a\n\nFROM t", "SELECT a FROM t"),
    ("SELECT a FROM t\nUNION\n\nSELECT b FROM u\n\nok", "SELECT a FROM t UNION SELECT b FROM u"),
    ("SELECT a FROM t WHERE x = 1 AND\n\ny = 2", "SELECT a FROM t WHERE x = 1 AND y = 2"),
    (f"```sql\n{Q}\n\nORDER BY name\n```", f"{Q} ORDER BY name"),
    ("SELECT a FROM t\n\nWHERE b = 1", "SELECT a FROM t WHERE b = 1"),
    ("SELECT a\n\nFROM t\nJOIN u\n\nON t.id = u.id\n \nWHERE b = 1\n\nGROUP BY a\n\nThis groups.",
     "SELECT a FROM t JOIN u ON t.id = u.id WHERE b = 1 GROUP BY a"),
    ("It is:\n\nSELECT a FROM t\n\nINTERSECT\n\nSELECT a FROM u\n\nDone", "SELECT a FROM t INTERSECT SELECT a FROM u"),
    ("SELECT a FROM t\n\n-- the good ones; only\n\nWHERE b = 1;\nok", "SELECT a FROM t WHERE b = 1"),
    ("DELETE FROM t\n\nWHERE a = 1;", "DELETE FROM t WHERE a = 1"),
    ("SELECT a FROM t\n\nWhere a is the column.", "SELECT a FROM t"),
    ("SELECT a FROM t\n\nOr this one: SELECT b; x", "SELECT a FROM t"), ("SELECT a FROM t\n\nW", "SELECT a FROM t"),
    ("SELECT a FROM t\n\nOn the other hand\n\nSELECT b FROM u", "SELECT a FROM t"),
    # thoughts
    (f"<|begin_of_thought|>SELECT 1;<|end_of_thought|>\n<|begin_of_solution|>\n{Q}\n<|end_of_solution|>", Q),
    (f"[THINK]SELECT 1;[/THINK]{Q}", Q), (f"<seed:think>SELECT 1;</seed:think>{Q}", Q),
    (f"<think>\nSELECT 1;\n```sql\nSELECT 2\n```\n</think>\n{Q};", Q),
    (f"<think>\nI need SELECT 1;\n</think>\n\n{FENCE}", Q),
    (f"<thinking>SELECT 1;</thinking>\nThe answer is:\n{FENCE}", Q),
    (f"Okay, SELECT 1;\nso\n</think>\n\n{Q}", Q),
    ("<think>\nSELECT 1;\nhmm", ""),
    (f"<reasoning>x</reasoning><answer>\n{Q}\n</answer>", Q),
    (f"◁think▷SELECT 1;◁/think▷{Q}", Q),
    (f"analysisWe need select.assistantfinal{FENCE}", Q),
    (f"<|channel|>analysis<|message|>SELECT 1;<|end|><|start|>assistant<|channel|>final<|message|>{Q}", Q),
    # labels, marks, shells
    (f"SQL: {Q}", Q), (f"sql: {Q}\n\nExplanation: x", Q), (f"Answer: {Q};", Q), (f"**Answer:** {Q}", Q),
    (f"**SQL Query:**\n{FENCE}", Q), (f"Here is the query: {Q}", Q), (f"Here's the SQL query:\n\n{Q}\n\nIt works", Q),
    (f"Reasoning with care.\nFinal SQL: {Q}", Q), (f"# Query\n{Q}", Q), (f"### SQL\n{Q}", Q), (f"### Answer\n{FENCE}", Q),
    (f"1. {Q}", Q), (f"- {Q}", Q), (f"> {Q}", Q), (f"1. We select names.\n2. `{Q}`", Q), (f"sqlite> {Q};", Q),
    (f"```\nsqlite> {Q}\n```", Q), (f"\ufeff{Q}", Q),
    # code in the text, JSON, tags
    (f"The SQL query is: `{Q}`.", Q), (f"`{Q};`", Q), (f"Use `{Q}` to get it. `name` is the column.", Q),
    (f'{{"sql": "{Q}"}}', Q), (f'```json\n{{"reasoning": "with", "sql": "{Q}"}}\n```', Q),
    (f"{{'sql': '{Q}'}}", Q), (f'query = """\n{Q}\n"""', Q), (f"```python\npd.read_sql('{Q}', conn)\n```", Q), (f'"{Q}"', Q),
    (f"We need $\\boxed{{{Q}}}$.", Q), (f"$$\\boxed{{\\text{{{Q}}}}}$$", Q), (f"<code>{Q}</code>", Q),
    (f" {Q} [/SQL]", Q), (f"[SQL]\n{Q};\n[/SQL]", Q), (f"As follows: [SQL] {Q} [/SQL]", Q),
    ("SELECT [SQL], [think] FROM t", "SELECT [SQL], [think] FROM t"), (f"<final_answer>{Q}</final_answer>", Q),
    (f"<Thought>SELECT 1</Thought>\n<Output>{Q}</Output>", Q), (f"{Q}。", Q), (f"SQL语句：{Q}；", Q),
    (f"> ```sql\n> {Q}\n> ORDER BY name\n> ```", f"{Q} ORDER BY name"),
    # entities of HTML
    (f"{Q.replace('>', '&gt;')}; ok", Q), (f"It is:\n```sql\n{Q.replace('>', '&gt;')};\n```", Q),
    ("SELECT a FROM t WHERE a &lt;&gt; &#39;x&#39;", "SELECT a FROM t WHERE a <> 'x'"),
    ("SELECT a FROM t WHERE a = 'AT&amp;T; x'; ok", "SELECT a FROM t WHERE a = 'AT&amp;T; x'"),
    (f"The result: <sql>{Q}</sql>", Q), ("The query is SELECT a FROM t. This returns it.", "SELECT a FROM t"),
    # an explanation on the next line, a stray end
    (f"{Q}\nThis query returns the names.", Q), (f"{Q}\nNote that it's good.\n\nMore", Q),
    (f"{Q}\nExplanation: it's fast; really.", Q), (f"{Q}\n```\nmore", Q), (f"{Q}```", Q), ("SELECT a FROM t.", "SELECT a FROM t"),
    # which fence
    (f"First, find ids:\n```sql\nSELECT id FROM singer\n```\nThen the final query:\n{FENCE}", Q),
    (f"This does it:\n{FENCE}\nAlternatively, you can use:\n```sql\nSELECT 2\n```", Q),
    (f"It is so:\n{FENCE}\nOutput:\n```\nname\nBob\n```", Q),
    (f"Schema:\n```sql\nCREATE TABLE singer (name TEXT);\n```\nThe query is this one:\n{FENCE}", Q),
    (f"I tried:\n```sql\nSELECT 1 FROM nowhere WHERE\n```\nbut\n{FENCE}\n", Q),
    (f"Step 1:\n```sql\nSELECT 1\n```\nStep 2:\n{FENCE}\nStep 3: unfinished\n```sql\nSELECT x FRO", Q),
    (f"```python\ncursor.execute('x')\n```\n{FENCE}", Q), (f"```sql\n```\n{FENCE}", Q),
    (f"Let me think. {Q}; is wrong.\nCorrected:\n```sql\nSELECT 3\n```", "SELECT 3"),
    # forms of a fence
    (f"I did it:\n```sql\n{Q}", Q), (f"I did it:\n```sql {Q}```", Q), (f"~~~sql\n{Q}\n~~~", Q), (f"```\nsql\n{Q}\n```", Q),
    (f"```SQLite\n{Q}\n```", Q), (f"````markdown\n{FENCE}\n````", Q), (f"```markdown\n{FENCE}\n```", Q),
    (f"```sql title=x\n{Q}\n```", Q), (f"```sql\n-- finds it; yes\n{Q}\n```", Q), (f"/* with this; */ {Q};", Q),
    # tokens of chat templates
    (f"{Q}<|im_end|>\n<|im_start|>user", Q), (f"{Q}</s>", Q), (f"{Q}<|endoftext|>SELECT 2", Q), (f"<|assistant|>\n{Q}", Q),
    (f"<|im_start|>assistant\n{Q}<|im_end|>", Q),
    ("SELECT tag FROM t WHERE tag = '</s>'", "SELECT tag FROM t WHERE tag = '</s>'"),
    ("SELECT tag FROM t WHERE tag = '<think>'", "SELECT tag FROM t WHERE tag = '<think>'"),
    ("Here you go\n```sql\nSELECT 1 FROM t WHERE tag = '</think>'\n```", "SELECT 1 FROM t WHERE tag = '</think>'"),
    # a question of the model's own
    (f"{Q}\n### Question\nfoo\n### SQL\nSELECT 2", Q),
    (f"It is:\n\n{FENCE}\n### Question\nWhat?\n### SQL\n```sql\nSELECT 2\n```", Q),
    (f"We compute it.\n{FENCE}\nQuestion: another\n```sql\nSELECT 2\n```", Q),
    # statements that are no query, and several
    ("DELETE FROM t;", "DELETE FROM t"), ("EXPLAIN SELECT 1", "EXPLAIN SELECT 1"), ("VALUES (1), (2)", "VALUES (1), (2)"),
    ("PRAGMA table_info(t);", "PRAGMA table_info(t)"), ("(SELECT 1) UNION SELECT 2", "(SELECT 1) UNION SELECT 2"),
    (f"```sql\nPRAGMA foreign_keys = ON;\n{Q};\n```", Q), (f"CREATE TEMP VIEW v AS SELECT 1;\n{Q}", Q),
    # nothing that reads as a query
    ("I do not know.", "I do not know."), ("", ""), ("SELECT FROM WHERE", "SELECT FROM WHERE"),
    ("It is\n```sql\nSELECT FROM\n```", "SELECT FROM"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), CASES)
def test_the_query_is_found_and_no_place_where_generation_stops_changes_it(answer: str, expected: str) -> None:
    assert extract_sql(answer) == expected
    reader = AnswerReader()
    for length in range(len(answer) + 1):
        complete = reader.feed(answer[:length])
        assert complete == answer_is_complete(answer[:length])
        if complete:
            assert extract_sql(answer[:length]) == expected
            return


PIECES = st.sampled_from(
    ["SELECT", "select ", "with", " ", "1", "a", " FROM t", ";", "\n", "\n\n", "###", "```", "`", "'", '"', "--", "/*", "*/",
     "sql", "\r", "SELECT a FROM t", "WITH x AS (SELECT 1)", "(", ")", ",", "<think>", "</think>", "\n```sql\n", "\n```\n",
     "SQL: ", "<|im_end|>", "### Question\n", "Question: ", "1. ", "~~~", "E'", "\\'", "$$", "#", "[", "]", 
     "[SQL]", "[/SQL]", "&gt;", "；", " WHERE a", "AND", "\\boxed{", "W", "<", "|",
     "DELETE FROM t", "CREATE TABLE t (a INT)", "<answer>", "Alternatively", "the rows.", "UNION", "-", "/", "q'", "</s>"]
)  # fmt: skip
ANSWERS = st.lists(PIECES, max_size=12).map("".join)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(ANSWERS, st.sampled_from(["sqlite", "mysql", "postgres", "bigquery", "tsql", "oracle"]))
@example("CREATE TABLE t (a INT)E'<|im_end|>q'~~~", "sqlite")
@example("SELECT[/SQL]", "mysql")  # without a space, and a token at a time
@example("SELECT a[1] FROM t[/sQl]", "postgres")
def test_stopping_and_extraction_agree_on_any_text_in_any_dialect(answer: str, dialect: str) -> None:
    sql, reader = extract_sql(answer, dialect), AnswerReader(dialect)
    for length in range(len(answer) + 1):
        if reader.feed(answer[:length]):
            assert extract_sql(answer[:length], dialect) == sql
            assert answer_is_complete(answer, dialect)
            return
    assert not answer_is_complete(answer, dialect)


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("mysql", r"SELECT id FROM notes WHERE body = 'it\'s late -- call; back' AND kind = 2"),
        ("mysql", "SELECT kind--1 FROM t WHERE a = 1"),
        ("postgres", r"SELECT 1 FROM t WHERE a = E'it\'s -- x;'"),
        ("postgres", "SELECT 1 FROM t WHERE a = $$it's -- x;\n\n$$"),
        ("tsql", "SELECT TOP 3 [a;b] FROM t"),
        ("bigquery", 'SELECT """a;b""" FROM `p.d.t`'),
        ("oracle", "SELECT q'[it's; x]' FROM dual"),
        ("sqlite", "SELECT glob, [a;b], `c;d` FROM outer WHERE x = 'it''s; </s> ```'"),
        ("sqlite", "SELECT a FROM"),
    ],
)
def test_what_training_teaches_is_read_back_byte_for_byte(dialect: str, sql: str) -> None:
    learned = completion(sql, dialect=dialect)
    assert extract_sql(learned, dialect) == learned
    assert extract_sql(f"{learned};\n\nThat's it; yes", dialect) == learned
    assert answer_is_complete(f"{learned};", dialect) is (sql != "SELECT a FROM")


@pytest.mark.parametrize(
    ("answer", "several"),
    [
        ("SELECT 1", False),
        ("SELECT 1;", False),
        ("SELECT 1;;", False),
        ("SELECT 1;\nThis counts.", False),
        (FENCE, False),
        ("SELECT 1; SELECT 2", True),
        ("PRAGMA x; SELECT 2", True),
        ("```sql\nSELECT 1;\nSELECT 2;\n```", True),
        ("It is this:\n```sql\nSELECT 1;\nDROP TABLE t;\n```", True),
        ("```sql\nSELECT 1; -- one; two\n```", False),
    ],
)
def test_an_answer_of_several_statements_says_so(answer: str, several: bool) -> None:
    assert read_answer(answer).several is several


@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think>",
        "[",
        "(",
        "/* ",
        "-- x\n",
        "PRAGMA x;",
        "\n",
        "the ",
        "`a` ",
        "<|",
        '"sql": "',
        "SELECT 1\n\nWHERE ",
        "\\boxed{",
        "'select ",
        "[SQL]",
        "<code>",
        "&gt;",
        "SELECT 1 &gt;",
        "\n\n-- x",
    ],
)
def test_hostile_answers_take_time_in_proportion_to_their_length(piece: str) -> None:
    def seconds(count: int) -> float:
        started = time.process_time()
        extract_sql("ok\n" + piece * count)
        return time.process_time() - started

    seconds(10)
    assert seconds(2000) < 3


def test_an_answer_is_read_up_to_a_limit() -> None:
    """The rest of a longer one cannot change its SQL, so generation ends there, too."""
    words = "word " * (MAX_CHARACTERS // 5)
    assert not answer_is_complete(words[:-1]) and answer_is_complete(words)
    assert extract_sql(f"{words}```sql\nSELECT 1\n```") == extract_sql(words)
    began = time.process_time()
    extract_sql("SELECT" + "\n" * 10_000_000 + "1")
    assert time.process_time() - began < 10
