"""`finetune serve` as a program: start, answers equal to those of the evaluation, and every way in which it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from finetune.cli.main import main
from finetune.data.prepared import load_prepared
from finetune.evaluation.run import evaluate_run
from finetune.export.run import Request, export_run
from finetune.run_folder import RunFolder
from finetune.serve.run import _private_folder
from tests.helpers.data_examples import make_database
from tests.helpers.errors import raises, reported
from tests.helpers.run_examples import copy_run
from tests.serve.test_guard import alive, until

START_SECONDS = 240.0
KEY = "k" * 24


@dataclass
class Program:
    process: subprocess.Popen[str]
    log: Path
    url: str = ""

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def sql(self, model: str, question: str, client: openai.OpenAI | None = None, **extra: Any) -> str:
        messages: Any = [{"role": "user", "content": question}]
        reply = (client or self.client()).chat.completions.create(model=model, messages=messages, extra_body=extra)
        return str(reply.choices[0].message.content)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as reply:
            return dict(json.load(reply))

    def backends(self) -> list[int]:
        """The processes that it has started, and theirs."""
        table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
        pairs = list(zip(map(int, table[::2]), map(int, table[1::2]), strict=True))
        found, waiting = [], [self.process.pid]
        while waiting:
            parent = waiting.pop()
            children = [pid for pid, ppid in pairs if ppid == parent]
            found += children
            waiting += children
        return found


Start = Callable[..., Program]


def starter(folder: Path, programs: list[Program]) -> Start:
    def start(run: Path, *words: str, ready: bool = True, environment: dict[str, str] | None = None) -> Program:
        log = folder / f"serve-{len(programs)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune", "serve", str(run), "--port", "0", *words],
                stderr=file, stdout=file, text=True, env=os.environ | (environment or {}), start_new_session=True,
            )  # fmt: skip
        program = Program(process, log)
        programs.append(program)
        if ready:
            found = until(lambda: process.poll() is not None or "ready after" in program.text(), START_SECONDS)
            assert found and process.poll() is None, program.text()
            match = re.search(r"ready after \d+ s: (http://\S+)/v1", program.text())
            assert match is not None
            program.url = match[1]
        return program

    return start


def ended(programs: list[Program]) -> None:
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait(30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []
    yield starter(tmp_path, programs)
    ended(programs)


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = copy_run(tiny_run, tmp_path_factory.mktemp("served"), evaluation={"generator": "hf"})
    evaluate_run(run, base=False, progress=False)
    return run


@pytest.fixture(scope="module")
def served(evaluated: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The tiny run with the backend hf, its database and a key."""
    folder = tmp_path_factory.mktemp("program")
    database = make_database(folder / "databases", items=40)
    programs: list[Program] = []
    words = ("--backend", "hf", "--db", f"shop={database}", "--execute", "--api-key-env", "SERVE_KEY")
    yield starter(folder, programs)(evaluated.path, *words, environment={"SERVE_KEY": KEY})
    ended(programs)


# answers


def test_the_answers_are_those_of_the_evaluation(evaluated: RunFolder, served: Program) -> None:
    rows = {row["id"]: row for row in map(json.loads, evaluated.eval_rows("tuned").read_text().splitlines())}
    config = evaluated.config()
    records = load_prepared(Path(config.data.output_dir)).records(config.evaluation.split)
    assert len(records) == 6
    client = served.client(KEY)

    def ask(record: Any) -> str:
        return served.sql("tiny-001", record.question, client, schema=record.schema, dialect=record.dialect)

    with ThreadPoolExecutor(6) as pool:
        for record, sql in zip(records, pool.map(ask, records), strict=True):
            assert sql == rows[record.id]["prediction"] != ""


def test_a_gguf_export_is_served_and_asked_through_llama_cpp(
    tiny_run: Path, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder has a tokenizer, but no model that transformers could load."""
    pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")
    run, folder = copy_run(tiny_run, tmp_path / "runs"), tmp_path / "gguf"
    export_run(run, Request(kind="gguf", quantizations=("q8_0",), sample=None), folder, progress=False)
    database = make_database(tmp_path / "databases", items=4)
    capsys.readouterr()
    assert main(["ask", str(folder), "How many items are there?", "--db", str(database)]) == 0
    asked = capsys.readouterr().out.strip()
    program = start(folder, "--db", f"shop={database}")
    assert program.health()["backend"] == "llama.cpp"
    assert program.sql(program.health()["model"], "How many items are there?", database="shop") == asked != ""


def test_64_clients_at_once_of_the_real_program(served: Program) -> None:
    client = served.client(KEY)

    def one(number: int) -> str:
        return served.sql("tiny-001", f"Which item has number {number % 4}?", client, database="shop")

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert len(answers) == 64 and all(answers) and answers[:4] * 16 == answers


def test_what_it_prints_when_it_is_ready(served: Program) -> None:
    text = served.text()
    assert "model tiny-001, backend hf, databases: shop, SQL is executed" in text
    assert 'openai.OpenAI(base_url="' in text and 'os.environ["SERVE_KEY"]' in text and "ssh -L" in text
    assert '-H "Authorization: Bearer $SERVE_KEY"' in text and KEY not in text
    assert "databases: shop" in text and served.health() == {"status": "ready", "model": "tiny-001", "backend": "hf"}


def test_the_key_is_wanted_and_the_backend_does_not_have_it(served: Program) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.sql("tiny-001", "Which?", database="shop")
    for pid in served.backends():
        assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_ask_an_endpoint(served: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEY", KEY)
    words = ["ask", served.url, "Which item has number 3?", "--db", "shop", "--api-key-env", "SERVE_KEY"]
    assert main(words) == 0
    sql = capsys.readouterr().out.strip()
    assert sql == served.sql("tiny-001", "Which item has number 3?", served.client(KEY), database="shop")


def test_control_tokens_in_a_question_are_text(served: Program) -> None:
    assert served.sql("tiny-001", "What is </s> <|im_end|> [INST]?", served.client(KEY), database="shop")


def test_a_prompt_beyond_the_models_positions(served: Program) -> None:
    schema = "".join(f"CREATE TABLE t{n} (id INTEGER, name TEXT);" for n in range(300))
    with pytest.raises(openai.BadRequestError) as caught:
        served.sql("tiny-001", "Which?", served.client(KEY), schema=schema)
    assert caught.value.code == "context_length_exceeded" and "tokens leaves no room" in str(caught.value)


# the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_server_and_backend(tiny_run: Path, start: Start, number: signal.Signals, tmp_path: Path) -> None:
    program = start(tiny_run, "--backend", "hf", "--heartbeat", str(tmp_path / "beat.json"))
    backends = program.backends()
    assert len(backends) == 2
    program.process.send_signal(number)
    assert program.process.wait(60) == 0
    assert f"finetune: stopped by {number.name}" in program.text() and "Traceback" not in program.text()
    assert f" serve {tiny_run} --port 0 --backend hf --heartbeat {tmp_path / 'beat.json'}   (" in program.text()
    assert not any(map(alive, backends))
    assert json.loads((tmp_path / "beat.json").read_text())["state"] == "stopped"


def test_kill_9_leaves_no_process_and_no_files(tiny_run: Path, start: Start) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short enough for a socket
        program = start(tiny_run, "--backend", "hf", environment={"TMPDIR": folder})
        backends = program.backends()
        assert len(backends) >= 2 and list(Path(folder).glob("finetune-serve*"))
        program.process.kill()
        assert until(lambda: not any(map(alive, backends)))
        assert until(lambda: not list(Path(folder).glob("finetune-serve*")))


def test_a_temporary_folder_may_have_a_long_name(tiny_run: Path, start: Start, tmp_path: Path) -> None:
    """A Unix socket in it could not be named: 107 bytes."""
    (long := tmp_path / ("t" * 120)).mkdir()
    assert start(tiny_run, "--backend", "hf", environment={"TMPDIR": str(long)}).health()["status"] == "ready"


def test_a_temporary_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/gone")  # short, so that a socket would fit
    with raises("serve.no_folder", match="set TMPDIR to another one"), _private_folder():
        raise AssertionError("there is no folder")


def test_the_end_of_the_backend_ends_the_server_with_a_line(tiny_run: Path, start: Start) -> None:
    program = start(tiny_run, "--backend", "hf")
    guard, backend = program.backends()
    os.kill(backend, signal.SIGKILL)
    assert until(lambda: '"failed"' in _health(program) or program.process.poll() is not None)
    assert program.process.wait(60) == 75
    assert "finetune: the backend hf ended: it was killed (SIGKILL)" in program.text() and not alive(guard)


def _health(program: Program) -> str:
    try:
        return json.dumps(program.health())
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return ""


def test_a_backend_that_never_starts_is_the_users_mistake(tiny_run: Path, start: Start, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", model={"name": str(tmp_path / "no-model")})
    program = start(run.path, "--backend", "hf", ready=False)
    assert program.process.wait(START_SECONDS) == 2
    assert "finetune: the backend hf ended: model.name: no folder" in program.text()


def test_it_ends_by_itself_when_idle_or_over_time(tiny_run: Path, start: Start, tmp_path: Path) -> None:
    beat = tmp_path / "beat.json"
    idle = start(tiny_run, "--backend", "hf", "--idle-minutes", "0.1", "--heartbeat", str(beat))
    assert idle.process.wait(60) == 0 and "finetune: no request for 0.1 minutes" in idle.text()
    assert json.loads(beat.read_text())["state"] == "stopped"
    late = start(tiny_run, "--backend", "hf", "--max-hours", "0.0005", ready=False)
    assert late.process.wait(START_SECONDS) == 0 and "finetune: --max-hours 0.0005 is over" in late.text()


def test_the_heartbeat_says_when_the_last_request_came(tiny_run: Path, start: Start, tmp_path: Path) -> None:
    beat = tmp_path / "beat.json"
    database = make_database(tmp_path / "databases")
    program = start(tiny_run, "--backend", "hf", "--heartbeat", str(beat), "--db", str(database))
    assert until(lambda: json.loads(beat.read_text())["state"] == "ready")
    assert json.loads(beat.read_text())["last_request_at"] is None
    program.sql("tiny-001", "Which?", database="shop")
    assert until(lambda: json.loads(beat.read_text())["answered"] == 1)
    found = json.loads(beat.read_text())
    assert (
        found["last_request_at"].startswith("20")
        and found["url"] == program.url
        and found["pid"] == program.process.pid
    )


def test_while_it_loads_it_says_so_and_can_be_ended(tiny_run: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = start(tiny_run, "--backend", "hf", "--port", str(port), ready=False)
    program.url = f"http://127.0.0.1:{port}"
    assert until(lambda: '"loading"' in _health(program), START_SECONDS)
    program.process.terminate()
    assert program.process.wait(60) == 0


# what is refused before anything is loaded


def test_two_servers_on_one_port(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, reported("serve.port_in_use"):
        assert main(["serve", str(tiny_run), "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--host", "0.0.0.0"], "serve.open_without_key"),
        (["--host", "::"], "serve.open_without_key"),
        (["--host", "0.0.0.0", "--api-key-env", "NO_SUCH_KEY"], "serve.weak_key"),
        (["--api-key-env", "SHORT_KEY"], "serve.weak_key"),
        (["--api-key-env", "ODD_KEY"], "serve.weak_key"),
        (["--host", "256.1.1.1", "--api-key-env", "GOOD_KEY"], "serve.bad_address"),
        (["--db", "nothing.sqlite"], "sql.database_missing"),
        (["--db", "a/b=nothing.sqlite"], "serve.bad_database_name"),
        (["--db", "=nothing.sqlite"], "serve.bad_database_name"),
        (["--db", "shop={shop}", "--db", "shop={shop}"], "serve.database_twice"),
        (["--execute"], "serve.nothing_to_execute"),
        (["--execute", "--db", "{schema}"], "serve.nothing_to_execute"),
        (["--backend", "vllm"], "serve.no_vllm"),
    ],
)
def test_options_that_cannot_be(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SHORT_KEY", "x" * 15)
    monkeypatch.setenv("ODD_KEY", "x" * 20 + " y")
    monkeypatch.setenv("GOOD_KEY", KEY)
    monkeypatch.delenv("FINETUNE_VLLM", raising=False)
    shop, schema = make_database(tmp_path / "databases"), tmp_path / "towns.sql"
    schema.write_text("CREATE TABLE town (id INTEGER);")
    with reported(code):
        assert (
            main(["serve", str(tiny_run), "--port", "0", *(word.format(shop=shop, schema=schema) for word in words)])
            == 2
        )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and KEY not in err and "x" * 15 not in err


def test_a_folder_that_is_neither_run_nor_export(tmp_path: Path) -> None:
    with reported("run.not_found"):
        assert main(["serve", str(tmp_path), "--port", "0"]) == 2


@pytest.mark.parametrize(
    "words",
    [["--port", "70000"], ["--port", "x"], ["--idle-minutes", "-1"], ["--max-hours", "nan"], ["--backend", "tgi"]],
)
def test_values_that_are_none(tiny_run: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_run), *words])


def test_without_the_packages_of_the_extra(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "starlette" else found(name, *rest)
    )
    with reported("install.missing_package"):
        assert main(["serve", str(tiny_run)]) == 2
