"""`finetune ask` towards an endpoint: what a server says, and servers that are down, slow, locked or of another kind."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.serve.client import Advice, Endpoint, Served
from tests.helpers.data_examples import make_database
from tests.helpers.errors import raises, reported
from tests.helpers.json_server import JsonHandler, serving

MODEL = {
    "id": "shop-model",
    "owned_by": "finetune",
    "finetune": {"dialects": ["sqlite"], "databases": ["shop"], "executes": False},
}
SERVED = Served("shop-model", ("sqlite",), ("shop",), False)


def handler(models: Any = None, answer: Any = None, *, status: int = 200) -> type[JsonHandler]:
    """A server with these replies to /v1/models and to a question."""

    class Handler(JsonHandler):
        def answer(self) -> tuple[int, Any]:
            if self.path == "/v1/models":
                return (200 if answer is not None else status), {"data": [MODEL]} if models is None else models
            self.rfile.read(int(self.headers["Content-Length"]))
            return status, answer

    return Handler


def message(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text} | more}]}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_what_it_serves_and_answers(path: str) -> None:
    with serving(handler(answer=message("SELECT 1", finetune={"columns": ["a"], "rows": [[1]]}))) as url:
        endpoint = Endpoint(url + path)
        assert endpoint.served() == SERVED
        assert endpoint.ask("How many?", SERVED, database="shop") == ("SELECT 1", {"columns": ["a"], "rows": [[1]]})


@pytest.mark.parametrize("url", ["http://", "http://:80", "http://a:b@host", "http://host?x=1", "http://host:99999"])
def test_an_address_that_is_none(url: str) -> None:
    with raises("endpoint.bad_url", match="expected the address of a server"):
        Endpoint(url)


@pytest.mark.parametrize(
    "models", [{"data": []}, {"data": [{"id": "gpt", "owned_by": "openai"}]}, [], {"object": "list"}]
)
def test_an_endpoint_of_another_program(models: Any) -> None:
    with serving(handler(models)) as url, raises("endpoint.not_finetune", match="not an endpoint of `finetune serve`"):
        Endpoint(url).served()


def test_a_server_that_is_down() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with raises("endpoint.unreachable", match="Connection refused"):
            Endpoint(url).served()


def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with raises("endpoint.timeout", match="no answer within 0 seconds"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2).served()


def test_a_key_that_is_missing_or_wrong() -> None:
    with serving(handler({"error": {"message": "no"}}, status=401)) as url:
        with raises("endpoint.wrong_key", match="it wants a key"):
            Endpoint(url).served()
        with raises("endpoint.wrong_key", match="the key is wrong") as told:
            Endpoint(url, "secret-key").served()
        assert "secret-key" not in str(told.value)


def test_the_reason_of_the_server_is_shown() -> None:
    error = {"error": {"message": "the question is empty"}}
    with serving(handler(answer=error, status=400)) as url, raises("endpoint.refused", match="the question is empty"):
        Endpoint(url).ask(" ", SERVED)


@pytest.mark.parametrize(
    "reply", [{"choices": []}, {"choices": [{"message": {}}]}, [], "text", {"choices": [{"message": 3}]}]
)
def test_replies_of_another_form(reply: Any) -> None:
    with serving(handler(answer=reply)) as url, raises("endpoint.odd_reply", match="no answer in its reply"):
        Endpoint(url).ask("How many?", SERVED)


@pytest.mark.parametrize(
    "told", [{"databases": [5, None]}, {"dialects": "sqlite"}, {"databases": {"shop": 1}}, {"dialects": [["sqlite"]]}]
)
def test_a_server_that_names_no_texts(told: dict[str, Any]) -> None:
    models = {"data": [MODEL | {"finetune": MODEL["finetune"] | told}]}  # type: ignore[operator]
    with serving(handler(models)) as url, raises("endpoint.not_finetune"):
        Endpoint(url).served()


@pytest.mark.parametrize(
    "rows",
    [{"rows": [[1]]}, {"rows": 5, "columns": ["a"]}, {"rows": [1], "columns": ["a"]}, {"rows": [], "columns": [1]}, 7],
)
def test_rows_of_another_form(rows: Any) -> None:
    reply = message("SELECT 1", finetune=rows)
    with serving(handler(answer=reply)) as url, raises("endpoint.odd_reply", match="no answer in its reply"):
        Endpoint(url).ask("How many?", SERVED)


def test_a_status_without_a_reason() -> None:
    with serving(handler([], status=404)) as url, raises("endpoint.odd_reply", match="status 404 without a reason"):
        Endpoint(url).served()


# the command


def ask(url: str, database: str, *words: str) -> int:
    return cli.main(["ask", url, "How many?", "--db", database, *words])


def test_a_database_that_neither_side_has(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(handler(answer=message("SELECT 1"))) as url, reported("endpoint.unknown_database"):
        assert ask(url, "other") == 2
    assert "--db other: neither a file here nor a database of" in capsys.readouterr().err


def test_rows_of_a_server_that_sends_none(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(handler(answer=message("SELECT 1"))) as url, reported("endpoint.not_executing"):
        assert ask(url, "shop", "--execute") == 2
    assert "was started without --execute" in capsys.readouterr().err


def test_sql_that_failed_at_the_server_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    executes = {"data": [MODEL | {"finetune": MODEL["finetune"] | {"executes": True}}]}  # type: ignore[operator]
    reply = message("SELECT nmae FROM shop", finetune={"error": "no such column: nmae"})
    with serving(handler(executes, reply)) as url:
        assert ask(url, "shop") == 0
        printed = capsys.readouterr()
        assert printed.out == "SELECT nmae FROM shop\n"
        assert printed.err == f"{url} has run it: the SQL does not run: no such column: nmae\n"
        with reported("ask.sql_failed"):
            assert ask(url, "shop", "--execute") == 2


def test_a_key_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with reported("endpoint.no_key"):
        assert ask("http://127.0.0.1:1", "shop", "--api-key-env", "THE_KEY") == 2
    assert "the variable THE_KEY is not set" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["two\nlines", "ü" * 20, "a b", "\x1b[31m"])
def test_a_key_that_no_header_can_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setenv("THE_KEY", key)
    with reported("endpoint.bad_key"):
        assert ask("http://127.0.0.1:1", "shop", "--api-key-env", "THE_KEY") == 2
    said = capsys.readouterr().err
    assert "the variable THE_KEY holds no good key" in said and key not in said


def test_a_redirect_says_where_to() -> None:
    class Moved(JsonHandler):
        def do_GET(self) -> None:
            self.send_response(301)
            self.send_header("Location", "https://elsewhere.example/v1/models")
            self.send_header("Content-Length", "0")
            self.end_headers()

    said = "status 301, moved to https://elsewhere.example/v1/models"
    with serving(Moved) as url, raises("endpoint.odd_reply", match=said):
        Endpoint(url).served()


def test_a_file_here_is_asked_about_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = make_database(tmp_path)
    with serving(handler(answer=message("SELECT id FROM item"))) as url:
        assert ask(url, str(database), "--execute") == 0
    said = capsys.readouterr().out
    assert said.startswith("SELECT id FROM item\n") and said.endswith("(3 rows)\n")


def test_a_server_that_failed_is_not_taken_for_a_wrong_address() -> None:
    with serving(handler([], status=502)) as url, raises("endpoint.failed", match=r"the server failed \(status 502\)"):
        Endpoint(url).served()


def test_a_reply_that_trickles_in_ends_at_the_limit() -> None:
    """Each byte comes in time for the socket; all of them together do not."""

    class Trickling(JsonHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.1)

    with serving(Trickling) as url:
        began = time.monotonic()
        with raises("endpoint.timeout"):
            Endpoint(url, seconds=0.5).served()
        assert time.monotonic() - began < 4


def test_another_server_has_its_own_advice() -> None:
    advice = Advice("set OPENAI_API_KEY", "is it the address?")
    with (
        serving(handler(answer={}, status=401)) as url,
        raises("endpoint.wrong_key", match="it wants a key; set OPENAI_API_KEY$"),
    ):
        Endpoint(url, advice=advice).complete("m", "s", "u", 0.0)


def test_the_most_tokens_reach_the_server_and_an_answer_cut_off_there_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    class Handler(JsonHandler):
        def answer(self) -> tuple[int, Any]:
            if self.path == "/v1/models":
                return 200, {"data": [MODEL]}
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = message("SELECT a, a")
            most = asked[-1].get("max_tokens")
            reply["choices"][0]["finish_reason"] = "length" if most else "stop"
            return 200, reply | {"usage": {"completion_tokens": min(5, most or 4)}}

    with serving(Handler) as url:
        assert ask(url, "shop") == 0
        assert capsys.readouterr() == ("SELECT a, a\n", "")
        assert ask(url, "shop", "--max-new-tokens", "3") == 0
        said = capsys.readouterr()
        assert ask(url, "shop", "--max-new-tokens", "9") == 0
    assert asked[1]["max_tokens"] == 3 and said.out == "SELECT a, a\n"
    assert "cut off at 3 tokens (--max-new-tokens)," in said.err
    assert "cut off at as many tokens as the server allows," in capsys.readouterr().err
