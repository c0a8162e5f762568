"""The endpoint as the official `openai` client sees it: answers, streams, rows, and what many clients get at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from finetune.data.prompts import PromptTemplate
from finetune.evaluation.generators.base import Answer
from tests.helpers.data_examples import SCHEMA, make_database
from tests.serve.conftest import Scripted, Serve, Served

QUESTION = "How many items are there?"
OTHER = "CREATE TABLE town (id INTEGER PRIMARY KEY, name TEXT);"


def ask(served: Served, *messages: tuple[str, str], **more: Any) -> Any:
    given: Any = [{"role": role, "content": content} for role, content in messages or [("user", QUESTION)]]
    return served.client().chat.completions.create(model="tiny", messages=given, **more)


# the prompt


def test_a_question_about_a_database_of_the_server(serve: Serve) -> None:
    served = serve()
    reply = ask(served, extra_body={"database": "shop"})
    assert served.backend.prompts == [PromptTemplate().render(schema=SCHEMA, question=QUESTION)]
    assert reply.choices[0].message.content == "SELECT COUNT(*) FROM item"
    assert (reply.model, reply.object, reply.choices[0].finish_reason) == ("tiny", "chat.completion", "stop")
    counts = reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens
    assert counts == (len(served.backend.prompts[0]) // 3, 8, counts[0] + 8)


@pytest.mark.parametrize(
    ("messages", "extra", "schema"),
    [
        ([("user", QUESTION)], {"schema": OTHER}, OTHER),
        ([("system", OTHER), ("user", QUESTION)], {}, OTHER),
        ([("developer", OTHER), ("user", QUESTION)], {}, OTHER),
        ([("system", f"You write SQL.\n```sql\n{OTHER}\n```\nBe brief."), ("user", QUESTION)], {}, OTHER),
        ([("system", "You write SQL."), ("user", QUESTION)], {"database": "shop"}, SCHEMA),
        ([("system", OTHER), ("user", QUESTION)], {"database": "shop"}, SCHEMA),
        ([("user", "What?"), ("assistant", "SELECT 1"), ("user", QUESTION)], {"database": "shop"}, SCHEMA),
        ([("user", QUESTION)], {}, SCHEMA),  # there is only one database
    ],
)
def test_where_the_schema_comes_from(
    serve: Serve, messages: list[tuple[str, str]], extra: dict[str, str], schema: str
) -> None:
    served = serve()
    ask(served, *messages, extra_body=extra)
    assert served.backend.prompts == [PromptTemplate().render(schema=schema, question=QUESTION)]


def test_a_clients_schema_stands_in_the_prompt_as_it_is(serve: Serve) -> None:
    """As records do in training and evaluation: their prompts are equal to the character."""
    served = serve()
    schema = "-- towns\nCREATE TABLE town (\n  id INTEGER PRIMARY KEY, -- number\n  name TEXT\n);\n"
    served.sql(QUESTION, schema=schema, database=None)
    assert served.backend.prompts == [PromptTemplate().render(schema=schema, question=QUESTION)]


def test_evidence_dialect_and_the_compact_form(serve: Serve) -> None:
    served = serve(template=PromptTemplate("compact", dialects=("sqlite", "postgres")))
    served.sql(QUESTION, evidence="Dear means more than 3.", dialect="PostgreSQL")
    [prompt] = served.backend.prompts
    assert prompt == PromptTemplate("compact").render(
        schema=SCHEMA,
        question=QUESTION,
        dialect="postgres",
        evidence="Dear means more than 3.",
        schema_dialect="sqlite",
    )
    assert "item(id, name, price)" in prompt


def test_parts_of_text_and_the_other_address(serve: Serve) -> None:
    served = serve()
    parts: Any = [{"type": "text", "text": "How many items"}, {"type": "text", "text": "are there?"}]
    served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    reply = served.client().completions.create(model="tiny", prompt=QUESTION, extra_body={"database": "shop"})
    assert served.backend.prompts[0] == served.backend.prompts[1]
    assert reply.choices[0].text == "SELECT COUNT(*) FROM item" and reply.object == "text_completion"
    assert reply.usage is not None and reply.usage.completion_tokens == 8


def test_a_database_that_changes_is_read_again(serve: Serve, shop: Path) -> None:
    import sqlite3

    served = serve()
    served.sql()
    with sqlite3.connect(shop) as connection:
        connection.execute("CREATE TABLE town (id INTEGER)")
    connection.close()
    served.sql()
    assert "town" not in served.backend.prompts[0] and "CREATE TABLE town (id INTEGER);" in served.backend.prompts[1]


# the answer


@pytest.mark.parametrize(
    ("said", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("Here it is:\n```sql\nSELECT name\nFROM item;\n```\nBye.", "SELECT name FROM item"),
        ("SELECT name FROM item;\n### Question\nAnother?", "SELECT name FROM item"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_the_sql_alone(serve: Serve, said: str, sql: str, stream: bool) -> None:
    served = serve(Scripted(said))
    if not stream:
        assert served.sql() == sql
        return
    chunks = list(ask(served, stream=True, extra_body={"database": "shop"}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == sql
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"


def test_max_tokens_lowers_the_limit_of_the_config_and_never_raises_it(serve: Serve) -> None:
    served = serve(Scripted(lambda _: Answer("SELECT 1", 7, None, 5)))
    replies = [ask(served, max_tokens=7), ask(served, max_completion_tokens=5000), ask(served, temperature=0.7)]
    assert served.backend.most == [7, 64, 64]
    assert [reply.choices[0].finish_reason for reply in replies] == ["length", "stop", "stop"]


def test_a_stream_comes_word_by_word_and_ends_with_the_counts(serve: Serve) -> None:
    served = serve(Scripted("SELECT name, price FROM item WHERE price > 3 ORDER BY price", part=1, seconds=0.001))
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 5 and "".join(texts) == "SELECT name, price FROM item WHERE price > 3 ORDER BY price"
    assert chunks[-1].usage.completion_tokens == len("".join(texts)) // 3 and not chunks[-1].choices
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_of_completions(serve: Serve) -> None:
    served = serve(Scripted("SELECT name FROM item", part=4))
    chunks = list(served.client().completions.create(model="tiny", prompt=QUESTION, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "SELECT name FROM item"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_backend_that_cannot_stream_gives_one_part(serve: Serve) -> None:
    served = serve(Scripted("SELECT name FROM item", streams=False))
    texts = [chunk.choices[0].delta.content for chunk in ask(served, stream=True)]
    assert [text for text in texts if text] == ["SELECT name FROM item"]


def test_sql_that_turns_out_to_be_none_ends_a_stream_with_an_error(serve: Serve) -> None:
    """What was sent cannot be taken back; without `stream` the answer is the SQL in the fence."""
    said = "SELECT the right column and so on from here\n```sql\nSELECT name FROM item\n```\n"
    served = serve(Scripted(said))
    assert served.sql() == "SELECT name FROM item"
    with pytest.raises(openai.APIError, match="ask again without `stream`"):
        list(ask(served, stream=True))


# rows


def test_rows_come_with_the_answer(serve: Serve) -> None:
    served = serve(Scripted("SELECT name, price, NULL, x'00ff', 9e999 FROM item WHERE id < 2"), execute=True)
    message = ask(served).choices[0].message
    assert message.finetune == {
        "columns": ["name", "price", "NULL", "x'00ff'", "9e999"],
        "rows": [["item 0", 0.0, None, {"blob": "00ff"}, "inf"], ["item 1", 1.5, None, {"blob": "00ff"}, "inf"]],
        "truncated": False,
    }
    last = list(ask(served, stream=True))[-1].choices[0].delta
    assert last.finetune == message.finetune
    reply: Any = served.client().completions.create(model="tiny", prompt=QUESTION)
    assert reply.choices[0].finetune == message.finetune


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("DROP TABLE item", "changing the schema is not allowed: a query may only read"),
        ("SELECT title FROM item", "no such column: title"),
        ("SELECT * FROM item a, item b, item c", "more than 500 rows"),
        (
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n",
            "no answer within 0.3",
        ),
        ("", "the model answered without SQL"),
    ],
)
def test_sql_that_may_not_or_does_not_run(serve: Serve, shop: Path, sql: str, error: str) -> None:
    before = shop.read_bytes()
    served = serve(Scripted(sql), execute=True, timeout_seconds=0.3, max_rows=500)
    message = ask(served).choices[0].message
    assert message.content == sql and error in message.finetune["error"]
    assert shop.read_bytes() == before


def test_many_rows_are_cut_and_say_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(Scripted("SELECT id FROM item ORDER BY id"), execute=True)
    monkeypatch.setattr(served.service.answering.rows, "_rows_sent", 5)
    rows = ask(served).choices[0].message.finetune
    assert rows == {"columns": ["id"], "rows": [[0], [1], [2], [3], [4]], "truncated": True}


def test_nothing_is_executed_unless_the_server_was_told_to_nor_for_a_clients_schema(serve: Serve) -> None:
    asked = serve(Scripted("SELECT 1"))
    assert not hasattr(ask(asked).choices[0].message, "finetune")
    executing = serve(Scripted("SELECT 1"), execute=True)
    assert not hasattr(ask(executing, extra_body={"schema": SCHEMA}).choices[0].message, "finetune")
    assert hasattr(ask(executing).choices[0].message, "finetune")
    other = ask(executing, extra_body={"dialect": "postgres"}).choices[0].message
    assert other.finetune == {"error": "no engine runs postgres; engines are there for sqlite"}


def test_a_schema_file_is_a_database_without_rows(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "towns.sql").write_text(OTHER)
    served = serve(Scripted("SELECT 1"), execute=True, databases=[f"towns={tmp_path / 'towns.sql'}"])
    assert not hasattr(ask(served, extra_body={"database": "towns"}).choices[0].message, "finetune")


# models and health


def test_models_and_health(serve: Serve) -> None:
    served = serve(execute=True)
    [model] = served.client().models.list().data
    assert (model.id, model.owned_by) == ("tiny", "finetune")
    assert model.model_extra is not None and model.model_extra["finetune"] == {
        "databases": ["shop"], "dialects": ["sqlite"], "executes": True, "backend": "scripted",
    }  # fmt: skip
    assert served.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other")


# many clients


def test_64_clients_at_once_are_all_answered_each_with_its_own_answer(serve: Serve) -> None:
    backend = Scripted(lambda prompt: f"SELECT {prompt.split('number ')[1].split('?')[0]}", parallel=8, seconds=0.005)
    served = serve(backend)
    client = served.client()

    def one(number: int) -> str:
        if number % 2:
            return served.sql(f"Which has number {number}?", client=client)
        messages: Any = [{"role": "user", "content": f"Which has number {number}?"}]
        chunks: Any = client.chat.completions.create(model="tiny", messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64))) == [f"SELECT {number}" for number in range(64)]
    assert backend.most_at_once == 8
    assert served.service.queue.inside == 0 and served.service.queue.answered == 64


def test_a_full_queue_refuses_with_the_time_to_wait(serve: Serve) -> None:
    backend = Scripted(parallel=2, seconds=0.5)
    served = serve(backend, waiting=3)
    refused: list[openai.RateLimitError] = []

    def one(_: int) -> str | None:
        try:
            return served.sql()
        except openai.RateLimitError as error:
            refused.append(error)
            return None

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert len(refused) >= 10 and sum(answer is not None for answer in answers) == 20 - len(refused) >= 5
    assert backend.most_at_once == 2
    for error in refused:
        assert error.code == "queue_full" and 1 <= int(error.response.headers["retry-after"]) <= 60
    assert served.service.queue.inside == 0
    assert served.sql() == "SELECT COUNT(*) FROM item", "there is room again"


def test_the_official_client_tries_again_by_itself(serve: Serve) -> None:
    served = serve(Scripted(parallel=1, seconds=0.3), waiting=1)
    client = served.client().with_options(max_retries=6)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: served.sql(client=client), range(4))) == {"SELECT COUNT(*) FROM item"}


def test_a_client_that_is_gone_frees_its_place_and_the_backend(serve: Serve) -> None:
    backend = Scripted("SELECT name FROM item WHERE id = 1", part=9, seconds=1.5)
    served = serve(backend)
    with pytest.raises(openai.APITimeoutError):
        served.sql(client=served.client().with_options(timeout=0.5))
    stream = ask(served, stream=True)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while (served.service.queue.inside or backend.at_once) and time.monotonic() < until:
        time.sleep(0.05)
    assert (served.service.queue.inside, backend.at_once, backend.abandoned) == (0, 0, 2)
    assert sum("client is gone" in line for line in served.log) == 2


def test_a_long_query_does_not_hold_up_other_answers(serve: Serve) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    served = serve(Scripted(lambda p: endless if "slow" in p else "SELECT 1"), execute=True, timeout_seconds=5.0)
    slow = threading.Thread(target=served.sql, args=("slow",))
    slow.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert served.sql("quick") == "SELECT 1" and time.monotonic() - began < 4
    slow.join()


def test_the_log_has_a_line_a_request_and_none_of_its_text(serve: Serve, tmp_path: Path) -> None:
    served = serve(Scripted("SELECT 'secret answer'"), execute=True, databases=[str(make_database(tmp_path / "b"))])
    served.sql("What is the secret question?")
    with pytest.raises(openai.BadRequestError):
        served.sql("secret", database="secret name")
    served.sql("secret", schema="CREATE TABLE secret (id INTEGER);", database=None)
    assert len(served.log) == 3 and not any("secret" in line for line in served.log)
    first, second, third = served.log
    assert first.startswith("POST /v1/chat/completions 200 ") and "shop" in first and first.endswith("1 rows")
    assert "400" in second and "unknown_database" in second and "schema of the client" in third
