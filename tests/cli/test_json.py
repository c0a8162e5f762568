"""--json on every command that prints a table: one document on stdout, and nothing else there."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import data
from finetune.cli import main as cli
from finetune.cli.main import main
from finetune.runtime.document import plain
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.data_examples import make_database
from tests.helpers.errors import reported
from tests.helpers.json_server import serving
from tests.helpers.predictions_examples import made, prepare_two, questions_of, write_config, write_result
from tests.helpers.report_fixtures import build_run
from tests.serve.test_client import handler, message

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs" / "mistral_7b_qlora.yaml"
SERVERS = ExitStack()
Shown = pytest.CaptureFixture[str]

WITHOUT_A_TABLE = {
    "completion": "prints a shell script",
    "demo": "prints the lines of the commands that it calls",
    "export": "prints where it has written",
    "init": "prints what it has written and three commands",
    "launch": "prints what SkyPilot prints",
    "serve": "runs until it is stopped, and answers in JSON",
    "train": "prints progress; `finetune watch --json` has the figures",
}


def parsers(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be called, by its words."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(path), parser
    for action in below:
        for name, sub in action.choices.items():
            yield from parsers(sub, (*path, name))


def test_every_command_that_prints_a_table_has_json() -> None:
    found = dict(parsers(cli._parser()))
    assert len(found) > 20
    with_json = {name for name, parser in found.items() if "--json" in parser._option_string_actions}
    others = set(found) - with_json
    assert {name for name in others if not name.startswith("job ")} == set(WITHOUT_A_TABLE), (
        "a new command prints a table: give it add_json; it prints none: say so in WITHOUT_A_TABLE"
    )
    assert set(CALLS) == with_json, "and try it below"


# --- what they print


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    lay_out_catalog(tmp_path / "home", fetched=datetime.now(UTC))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "_tokenizer_if_installed", lambda config: None)
    yield tmp_path
    SERVERS.close()


def a_run(folder: Path) -> str:
    run = build_run(folder / "runs/mine", questions=40)
    (run / "config.yaml").touch()
    return str(run)


def data_config(folder: Path) -> str:
    return str(write_config(folder, prepare_two(folder)))


def predicted(folder: Path) -> list[str]:
    prepared = prepare_two(folder)
    file = folder / "theirs.sql"
    file.write_text("\n".join(record.sql for record in questions_of(prepared)))
    return ["evaluate", str(write_config(folder, prepared)), "--predictions", str(file)]


def asked(folder: Path) -> list[str]:
    url = SERVERS.enter_context(serving(handler(answer=message("SELECT id FROM item"))))
    return ["ask", url, "How many?", "--db", str(make_database(folder)), "--execute"]


def two_results(folder: Path) -> list[str]:
    rows = [made("correct" if number % 3 else "wrong_rows", number) for number in range(12)]
    return ["compare", *(str(write_result(folder / name, rows)) for name in ("a", "b"))]


SWEEP = ["sweep", str(SHIPPED), "lora.r=8,16", "--plan", "--max-sweep-usd", "5"]
CALLS: dict[str, tuple[Callable[[Path], list[str]], Callable[[Any], object]]] = {
    "ask": (asked, lambda found: found["rows"] == [[0], [1], [2]] or found["rows"] == [[1], [2], [3]]),
    "generate": (lambda folder: ["generate", *asked(folder)[1:]], lambda found: found["columns"] == ["id"]),
    "compare": (two_results, lambda found: found["models"]),
    "config": (lambda folder: ["config", str(SHIPPED), "lora.r=8"], lambda found: found["lora"]["r"] == 8),
    "data check": (
        lambda folder: ["data", "check", data_config(folder)],
        lambda found: found["records"] == {"train": 2, "val": 1, "test": 6} and found["rejections"] == [],
    ),
    "data prepare": (
        lambda folder: ["data", "prepare", data_config(folder)], lambda found: found["counts"]["test"] == 6,
    ),
    "doctor": (lambda folder: ["doctor"], lambda found: {row["name"] for row in found["rows"]} >= {"RAM", "CPU"}),
    "evaluate": (predicted, lambda found: found["models"]["theirs"]["execution_accuracy"] == 1.0),
    "machine": (lambda folder: ["machine", "--max-hours", "2", "--wall-hours"], lambda found: found["hours_left"] > 0),
    "plan": (
        lambda folder: ["plan", str(SHIPPED)],
        lambda found: found["basis"]["usd"] == "estimated" and found["basis"]["usd_per_hour"].startswith("catalog")
        and all({"usd", "hours", "tokens_per_second_basis"} <= set(row) for row in found["rows"]),
    ),
    "report": (
        lambda folder: ["report", a_run(folder)],
        lambda found: found["questions"] == 40 and found["basis"]["minutes"] == "measured",
    ),
    "runs": (
        lambda folder: ["runs", str(Path(a_run(folder)).parent)],
        lambda found: found[0]["name"] == "mine" and found[0]["basis"]["hours"] == "measured",
    ),
    "sweep": (
        lambda folder: SWEEP,
        lambda found: found["basis"]["usd"].startswith("estimated") and found["rows"][0]["machines"] == 1,
    ),
    "watch": (
        lambda folder: ["watch", a_run(folder)],
        lambda found: found["steps"] == 240 and found["basis"]["projected_usd"] == "estimated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CALLS))
def test_json_is_one_document_and_nothing_else_is_on_stdout(name: str, here: Path, capsys: Shown) -> None:
    words, is_right = CALLS[name]
    typed = words(here)
    capsys.readouterr()
    assert main([*typed, "--json"]) in (0, 1)  # 1: doctor and data check found something

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert is_right(found)


def test_memory_as_json_has_the_figures_of_the_table(here: Path, capsys: Shown) -> None:
    assert main(["plan", str(SHIPPED), "--memory"]) == 0
    table = capsys.readouterr().out
    for kernels in ("auto", "hf"):
        assert main(["plan", str(SHIPPED), f"training.kernels={kernels}", "--memory", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["basis"].startswith("estimated") and len(found["rows"]) > 3
        for row in found["rows"]:
            assert row["gpu"] in table and row["needed_gib"] > 1 and row["parts_gib"]["base"] > 1
            if kernels == "auto":
                assert f"{row['needed_gib']:.2f}" in table


def test_errors_are_on_stderr_with_the_usual_exit_code(here: Path, capsys: Shown) -> None:
    with reported("run.not_found"):
        assert main(["watch", str(here / "runs/absent"), "--json"]) == 2
    with reported("price.unknown"):
        assert main(["machine", "--json"]) == 2
    assert main(["plan", str(here / "absent.yaml"), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("finetune: ") >= 1


def test_what_a_library_or_a_program_prints_goes_to_stderr(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys\n"
        "from finetune.runtime.document import document_only, print_document\n"
        "with document_only(True):\n"
        "    print('a library'); os.write(1, b'C code\\n'); subprocess.run(['echo', 'a program'])\n"
        "    print_document({'path': float('nan')})\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == '{\n  "path": null\n}\nafter\n'
    assert sorted(done.stderr.split("\n")) == ["", "C code", "a library", "a program"]


def test_a_reader_that_has_gone_is_no_error(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "config", str(SHIPPED), "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert plain({"a": [1.5, float("nan"), (float("inf"),)], "b": "NaN"}) == {"a": [1.5, None, [None]], "b": "NaN"}
