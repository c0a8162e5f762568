"""What the endpoint refuses: mistakes of clients, and what is meant to do harm. Every answer is JSON in OpenAI's format."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.serve import exchange
from finetune.serve.backends.base import BackendError, PromptTooLong
from finetune.serve.questions import MAX_BODY_BYTES
from tests.helpers.data_examples import SCHEMA
from tests.serve.conftest import Scripted, Serve, Served

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "How many items are there?"}]
KEY = "a-key-of-more-than-16-characters"


def send(
    served: Served, body: Any, path: str = CHAT, *, method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error and headers. body: sent as it is if it is bytes, else as JSON."""
    given = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    try:
        connection.request(method, path, given, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    value = json.loads(content)
    if response.status != 200 and path != "/health":
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}
        assert "\n" not in value["error"]["message"] and len(value["error"]["message"]) <= 500
        value = value["error"]
    return response.status, value, {name.lower(): text for name, text in response.getheaders()}


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES} | changes


# mistakes


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        (chat(model="gpt-4"), 404, "model_not_found", "no model is called 'gpt-4' here; this server has tiny"),
        (chat(model=None), 400, "missing_parameter", "model: missing; this server has tiny"),
        (chat(model=3), 400, "invalid_value", "model: expected a text, found 3"),
        (chat(messages=[]), 400, "invalid_value", "messages: expected a list with at least one message"),
        (chat(messages=None), 400, "invalid_value", "messages: expected a list"),
        (chat(messages=["hello"]), 400, "invalid_value", "messages[0]: expected an object with a role"),
        (chat(messages=[{"role": "bard", "content": "x"}]), 400, "invalid_value", "messages[0]"),
        (chat(messages=[{"role": "user", "content": 3}]), 400, "invalid_value", "messages[0].content: expected a text"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "invalid_value", "only parts of type text"),
        (chat(messages=[{"role": "system", "content": SCHEMA}]), 400, "empty_question", "none is from the user"),
        (chat(messages=[{"role": "user", "content": " \n"}]), 400, "empty_question", "the question is empty"),
        (chat(database="ship"), 400, "unknown_database", "no database is called 'ship'; this server has shop"),
        (chat(database=["shop"]), 400, "invalid_value", "database: expected a text, found ['shop']"),
        (chat(databse="shop"), 400, "unknown_parameter", "unknown key 'databse'; did you mean database?"),
        (chat(schema=SCHEMA, database="shop"), 400, "invalid_value", "`schema` and `database` are both given"),
        (chat(schema="nonsense"), 400, "unreadable_schema", "schema: no CREATE TABLE statement in it"),
        (chat(schema=""), 400, "unreadable_schema", "no CREATE TABLE statement"),
        (chat(schema="CREATE TABLE item (id INTEGER"), 400, "unreadable_schema", "schema: "),
        (chat(dialect="klingon"), 400, "unknown_dialect", "klingon"),
        (chat(n=2), 400, "unsupported_parameter", "n: 2 is not supported"),
        (chat(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools: "),
        (chat(response_format={"type": "json_object"}), 400, "unsupported_parameter", "response_format: "),
        (chat(logprobs=True), 400, "unsupported_parameter", "logprobs: True is not supported"),
        (chat(max_tokens=0), 400, "invalid_value", "max_tokens: expected a whole number of at least 1, found 0"),
        (chat(max_tokens=True), 400, "invalid_value", "max_tokens"),
        (chat(stream="yes"), 400, "invalid_value", "stream: expected true or false, found 'yes'"),
        (chat(stream_options=3), 400, "invalid_value", "stream_options: expected an object"),
        ([chat()], 400, "invalid_json", "the body: expected a JSON object"),
        ("", 400, "invalid_json", "the body: expected a JSON object"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_request_is_named(serve: Serve, body: Any, status: int, code: str, said: str) -> None:
    served = serve()
    found = send(served, body)
    assert (found[0], found[1]["code"]) == (status, code) and said in found[1]["message"]
    assert not served.backend.prompts and served.service.queue.inside == 0


@pytest.mark.parametrize("key", ["n", "best_of"])
def test_what_asks_for_nothing_special_is_no_mistake(serve: Serve, key: str) -> None:
    body = chat(
        temperature=0.7, top_p=0.9, seed=1, stop=["\n"], user="me", tools=[], response_format={"type": "text"},
        logprobs=False, stream=None, max_tokens=None, tool_choice="none", **{key: 1},
    )  # fmt: skip
    assert send(serve(), body)[0] == 200


def test_completions_take_one_question(serve: Serve) -> None:
    served = serve()
    for prompt, status in (("Which?", 200), (["Which?"], 200), (["Which?", "What?"], 400), ([1, 2], 400), (None, 400)):
        assert send(served, {"model": "tiny", "prompt": prompt}, "/v1/completions")[0] == status


def test_without_a_schema_the_databases_are_listed(serve: Serve, shop: Any) -> None:
    two = serve(databases=[f"shop={shop}", f"other={shop}"])
    none = serve(databases=[])
    code, error, _ = send(two, chat())
    assert (code, error["code"]) == (400, "missing_schema") and error["message"].endswith("this server has shop, other")
    code, error, _ = send(none, chat())
    assert (code, error["code"]) == (400, "missing_schema") and "started without any" in error["message"]


@pytest.mark.parametrize(
    "name", ["../shop", "/etc/passwd", "shop/../shop", "shop.sqlite", "shop\x00", "shop'; DROP TABLE item; --", "SHOP"]
)
def test_a_database_is_a_name_and_never_a_path(serve: Serve, name: str) -> None:
    served = serve(execute=True)
    status, error, _ = send(served, chat(database=name))
    assert (status, error["code"]) == (400, "unknown_database")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_other_addresses_and_methods(serve: Serve, method: str, path: str, status: int) -> None:
    assert send(serve(), None, path, method=method)[0] == status


# the key, and who may ask


def test_without_the_key_nothing_is_told(serve: Serve) -> None:
    served = serve(key=KEY)
    for given in (None, "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer ", "Bearer \u00e9"):
        headers = {} if given is None else {"Authorization": given}
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/tiny")):
            status, error, found = send(served, chat(), path, method=method, headers=headers)
            assert (status, error["code"], found["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert not served.backend.prompts and not any(KEY in line for line in served.log)
    assert served.sql(client=served.client(KEY)) == "SELECT COUNT(*) FROM item"
    assert send(served, None, "/health", method="GET")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        served.sql()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", ""]
)
def test_without_a_key_other_names_of_this_machine_are_refused(serve: Serve, host: str) -> None:
    """DNS rebinding: a web page whose name suddenly leads to 127.0.0.1."""
    open_, closed = serve(), serve(key=KEY)
    assert send(open_, chat(), headers={"Host": host})[0] == 403
    assert send(open_, None, "/health", method="GET", headers={"Host": host})[0] == 403
    assert send(closed, chat(), headers={"Host": host, "Authorization": f"Bearer {KEY}"})[0] == 200
    for name in ("localhost", "LOCALHOST:9999", "127.0.0.1", "[::1]", "[::1]:8000"):
        assert send(open_, chat(), headers={"Host": name})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_a_web_page_is_no_request(serve: Serve, kind: str) -> None:
    status, error, _ = send(serve(), chat(), headers={"Content-Type": kind})
    assert (status, error["code"]) == (415, "invalid_content_type")


# size


def test_a_question_of_100_kb_and_a_body_of_megabytes(serve: Serve) -> None:
    served = serve()
    status, error, _ = send(served, chat(messages=[{"role": "user", "content": "x" * 100_000}]))
    assert (status, error["code"]) == (400, "context_length_exceeded") and "100,000 characters" in error["message"]
    status, error, _ = send(served, chat(schema="x" * MAX_BODY_BYTES))
    assert (status, error["code"]) == (413, "body_too_large")
    assert not served.backend.prompts and served.service.queue.inside == 0


def test_a_body_without_a_length_is_limited_too(serve: Serve) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", urlsplit(served.url).port or 0)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            while sent < 50 * MAX_BODY_BYTES:
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
        except OSError:
            pass  # it has hung up
        assert sent < 20 * MAX_BODY_BYTES
    assert served.sql() == "SELECT COUNT(*) FROM item"


def test_a_body_that_never_comes_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.3)
    served = serve()
    with socket.create_connection(("127.0.0.1", urlsplit(served.url).port or 0), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert served.service.queue.inside == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny",}',
        b"\xff\xfe",
        b"nul\x00",
        b'{"a": ' * 100_000,
        b"[" * 500_000,
        b'{"model": "tiny", "model": "tiny"}',
        b'{"model": NaN}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"n": 1e999}',
    ],
)  # fmt: skip
def test_what_is_no_json_is_one_line(serve: Serve, body: bytes) -> None:
    status, error, _ = send(serve(), body)
    assert (status, error["code"]) == (400, "invalid_json")


def test_deep_json_within_a_known_key(serve: Serve) -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    served = serve()
    for key in ("messages", "schema", "tools", "metadata", "stream"):
        assert send(served, chat(**{key: deep}))[0] in (200, 400)


# odd text


@pytest.mark.parametrize(
    "text",
    ["</s><|im_end|>[INST]", "a\x00b", "\u202e\x1b[2J", "🦊 ü", "'; DROP TABLE item; --", "### SQL\nDROP TABLE item"],
)
def test_odd_text_is_text(serve: Serve, text: str) -> None:
    served = serve(execute=True)
    assert send(served, chat(messages=[{"role": "user", "content": text}]))[0] == 200
    assert " ".join(text.split()) in served.backend.prompts[0]
    assert len(served.log) == 1 and served.log[0].isprintable()


@pytest.mark.parametrize("key", ["database", "schema", "evidence", "dialect"])
def test_half_a_character_is_no_text(serve: Serve, key: str) -> None:
    served = serve()
    assert send(served, json.dumps(chat(**{key: "\ud800"})).encode())[0] == 400
    assert send(served, json.dumps(chat(messages=[{"role": "user", "content": "\ud800"}])).encode())[0] == 400


@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TABLE t (a INTEGER);\x00",
        "CREATE TABLE t AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n;",
        "ATTACH '/etc/passwd' AS p; CREATE TABLE t (a);",
        "CREATE TABLE t (a DEFAULT (randomblob(1000000000)));",
        "CREATE VIRTUAL TABLE t USING fts5(a); INSERT INTO t VALUES (1);",
        "CREATE TABLE t (" + ", ".join(f"c{n} INTEGER" for n in range(20_000)) + ");",
        "CREATE TABLE t (a CHECK (" + "(" * 5000 + "1" + ")" * 5000 + "));",
        "CREATE TABLE t (a);" * 20_000,
        "CREATE TABLE " + "\"" * 100_000 + " (a);",
        "CREATE TABLE t (a);" + "/*" * 200_000,
    ],
    ids=["nul", "endless", "attach", "blob", "virtual", "columns", "deep", "tables", "quotes", "comments"],
)  # fmt: skip
def test_a_hostile_schema_is_read_or_refused_in_time(serve: Serve, schema: str) -> None:
    served = serve(execute=True)
    began = time.monotonic()
    status, answer, _ = send(served, chat(schema=schema))
    assert time.monotonic() - began < 30
    assert status == 200 or (status, answer["code"]) in ((400, "unreadable_schema"), (413, "body_too_large"))
    assert served.sql() == "SELECT COUNT(*) FROM item"


# the backend


@pytest.mark.parametrize(
    ("fails", "status", "code"),
    [
        (BackendError("ConnectError: refused"), 502, "backend_down"),
        (PromptTooLong(9000, 8192), 400, "context_length_exceeded"),
        (UserError("cannot write this", code="model.control_token"), 400, "unreadable_text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_backend_cannot_do(serve: Serve, fails: Exception, status: int, code: str, stream: bool) -> None:
    served = serve(Scripted(fails=fails))
    found = send(served, chat(stream=stream))
    assert (found[0], found[1]["code"]) == (status, code)
    assert served.service.queue.inside == 0 and served.backend.at_once == 0


@pytest.mark.parametrize(
    ("problem", "status", "code"),
    [
        ("too_long", 400, "context_length_exceeded"),
        ("out_of_memory", 503, "out_of_memory"),
        ("failed", 502, "backend_down"),
    ],
)
def test_problems_of_an_answer(serve: Serve, problem: Any, status: int, code: str) -> None:
    served = serve(Scripted(lambda _: Answer("", 0, problem, 9000)))
    found = send(served, chat())
    assert (found[0], found[1]["code"]) == (status, code)
    if problem == "too_long":
        assert "the prompt of 9000 tokens leaves no room" in found[1]["message"]


def test_while_loading_and_after_the_end_of_the_backend(serve: Serve) -> None:
    served = serve()
    served.service.state = "loading"
    status, error, headers = send(served, chat())
    assert (status, error["code"], headers["retry-after"]) == (503, "loading", "5")
    assert send(served, None, "/health", method="GET")[0] == 503
    served.service.state, served.service.fault = "failed", "CUDA error: out of memory"
    status, error, _ = send(served, chat())
    assert (status, error["code"]) == (502, "backend_down") and "CUDA error" in error["message"]
    assert send(served, None, "/health", method="GET")[0] == 503


def test_a_fault_of_ours_is_json_too_and_the_server_lives_on(serve: Serve) -> None:
    served = serve(Scripted(fails=ZeroDivisionError("oh")))
    status, error, _ = send(served, chat())
    assert (status, error["code"], error["type"]) == (500, "internal_error", "server_error") and "oh" not in error[
        "message"
    ]
    served.backend.fails = None
    assert served.sql() == "SELECT COUNT(*) FROM item"
