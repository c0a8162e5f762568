"""Terminals and locales that lack characters: what is printed is escaped, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from finetune.runtime.console import typed_text
from finetune.runtime.files import read_json, write_json, write_text
from tests.helpers.data_examples import make_database, row, write_jsonl

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[2]
ConfigWriter = Callable[..., Path]
LOCALES = ("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE", "LC_ALL", "LC_CTYPE", "LANG", "LANGUAGE")
TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "UTF-8": {"PYTHONIOENCODING": "utf-8"},
}
UNSAID = "gr\u00fc\u00df\u2192\u65e5"
"""ASCII has none of these characters, Latin-1 two."""
NO_TEXT = os.fsdecode(b"\xff")
"""A file name of one byte that is not UTF-8, as Python decodes it."""


@pytest.fixture(params=TERMINALS)
def terminal(request: pytest.FixtureRequest) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LOCALES}
    return kept | TERMINALS[request.param]


def finetune(terminal: dict[str, str], *words: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    """The real command line; no command may end in a traceback."""
    return python(terminal, "-m", "finetune", *words, cwd=cwd)


def python(terminal: dict[str, str], *words: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *words], env=terminal | {"PYTHONPATH": str(ROOT)}, cwd=cwd, capture_output=True, timeout=300
    )
    out, err = (os.fsdecode(stream) for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err and "UnicodeEncodeError" not in err and "Logging error" not in err, err
    return done.returncode, out, err


# --- errors and help


ASKS_ALL = """
import sys
from finetune.cli.main import main
name = sys.argv[1]
for words in (
    ["train", name], ["train", "--resume", name], ["evaluate", name], ["report", name], ["config", name], ["plan", name],
    ["data", "check", name], ["data", "prepare", name], ["generate", name, "a question", "--db", name],
):
    assert main(words) == 2, words
"""


@pytest.mark.parametrize("name", [UNSAID, NO_TEXT], ids=["unsaid", "no-text"])
def test_a_missing_file_is_reported_in_one_line(terminal: dict[str, str], name: str) -> None:
    code, out, err = python(terminal, "-c", ASKS_ALL, name)
    assert (code, out) == (0, ""), err
    lines = err.splitlines()
    assert len(lines) == 9 and all(line.startswith("finetune: ") for line in lines)
    assert all("no such" in line or "not a run" in line for line in lines)


def test_usage_errors_and_help_are_printed(terminal: dict[str, str]) -> None:
    code, _, err = finetune(terminal, UNSAID)
    assert code == 2 and "invalid choice" in err
    code, _, err = finetune(terminal, "generate", "runs/none", NO_TEXT, "--db", "shop.sqlite")
    assert code == 2 and r"expected text in UTF-8, found '\udcff'" in err
    assert finetune(terminal, "--help")[0] == finetune(terminal, "train", "--help")[0] == 0


def test_a_file_name_that_the_locale_cannot_encode_is_reported(tmp_path: Path) -> None:
    """The name is in the config, which is UTF-8 everywhere."""
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{name: m}}\ndata: {{sources: [{{kind: jsonl, path: {UNSAID}.jsonl}}], output_dir: prepared}}\n",
        encoding="utf-8",
    )
    ascii_locale = {name: value for name, value in os.environ.items() if name not in LOCALES} | TERMINALS["C"]
    code, out, err = finetune(ascii_locale, "data", "check", str(config))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "this locale's encoding, ascii, has no such characters: set PYTHONUTF8=1" in err
    code, _, err = finetune(ascii_locale | {"PYTHONUTF8": "1"}, "data", "check", str(config))
    assert code == 2 and "no such file" in err


# --- results


def test_rejected_records_are_listed(terminal: dict[str, str], tmp_path: Path) -> None:
    """Their texts come from the user's file and go to stdout, where Python by default would raise."""
    wrong = json.dumps(row(2, schema=f"CREATE TABL {UNSAID}"), ensure_ascii=False)
    records = write_jsonl(tmp_path / "records.jsonl", [row(1), wrong])
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{name: m}}\ndata: {{sources: [{{kind: jsonl, path: {records}}}], output_dir: prepared}}\n"
    )
    code, out, err = finetune(terminal, "data", "check", str(config))
    assert code == 1 and err.startswith("tokens are not counted: ") and err.count("\n") == 2, "there is no model m"
    assert err.splitlines()[1].startswith("data check: ")
    assert (UNSAID if terminal.get("PYTHONIOENCODING") == "utf-8" else r"\u2192\u65e5") in out
    assert "1 rejected" in out
    code, out, err = finetune(terminal, "config", str(config), f"training.run_name={UNSAID}")
    assert (code, err) == (0, "")
    assert f"run_name: {UNSAID if terminal.get('PYTHONIOENCODING') == 'utf-8' else 'gr'}" in out


GENERATES = """
import sys
from finetune.evaluation.generators import hf
from finetune.evaluation.generators.base import Answer
def say(model, tokenizer, prompts, **_):
    assert "\\u2192" in prompts[0], prompts
    return [Answer("SELECT name FROM item", 5)]
hf.generate_answers = say
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("terminal", ["ascii", "C"], indirect=True)
def test_rows_and_questions_of_other_scripts(terminal: dict[str, str], tiny_run: Path, tmp_path: Path) -> None:
    database = make_database(tmp_path, items=2)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE item SET name = ? WHERE id = 1", (UNSAID,))
        connection.commit()
    words = ("generate", str(tiny_run), f"Was kostet {UNSAID}?", "--db", str(database), "--run")
    code, out, err = python(terminal, "-c", GENERATES, *words)
    assert code == 0, err
    assert "(2 rows)" in out
    assert UNSAID in out or r"\u2192\u65e5" in out


# --- a whole run under such names


@pytest.mark.parametrize("encoding", ["ascii", "C"])
def test_a_run_whose_names_cannot_be_printed(encoding: str, write_config: ConfigWriter, tmp_path: Path) -> None:
    """The progress bar, messages, the record and the report; the config's name is not valid text."""
    terminal = {name: value for name, value in os.environ.items() if name not in LOCALES} | TERMINALS[encoding]
    folder = tmp_path / (UNSAID if encoding == "ascii" else "plain")
    folder.mkdir()
    training = {"output_dir": "runs", "max_steps": 2, "run_name": UNSAID if encoding == "ascii" else "plain"}
    config = write_config(folder, training=training).rename(folder / f"{NO_TEXT}.yaml")
    code, _, err = finetune(terminal, "train", config.name, cwd=folder)
    assert code == 0, err
    (run,) = (folder / "runs").iterdir()
    record = read_json(run / "run.json", "")
    assert (record["status"], record["config_file"]) == ("done", "\\udcff.yaml")
    assert (run / "config.yaml").read_text(encoding="utf-8").startswith("# finetune train '\\udcff.yaml'\n")
    code, out, err = finetune(terminal, "report", f"runs/{run.name}", cwd=folder)
    assert code == 0, err
    assert ascii(run.name).strip("'") in out
    for name in ("report.html", "report.md", "summary.json"):
        assert (run / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("where", "encoding"), [("name", "ascii"), ("folder", "C")])
def test_a_run_folder_whose_name_is_not_text_is_refused_before_training(
    where: str, encoding: str, write_config: ConfigWriter, tmp_path: Path
) -> None:
    """The tokenizer could not be saved there, which would show only after training."""
    terminal = {name: value for name, value in os.environ.items() if name not in LOCALES} | TERMINALS[encoding]
    folder = tmp_path / ("plain" if where == "name" else UNSAID if encoding == "C" else NO_TEXT)
    folder.mkdir()
    config = write_config(tmp_path, training={"output_dir": "runs"})
    config = config.rename(folder / (f"{NO_TEXT}.yaml" if where == "name" else "tiny.yaml"))
    code, _, err = finetune(terminal, "train", config.name, cwd=folder)
    assert code == 2 and err.count("\n") == 1
    assert ("set PYTHONUTF8=1" if encoding == "C" else "a run cannot be named after it") in err
    assert not (folder / "runs").exists()


def test_other_programs(terminal: dict[str, str], tmp_path: Path) -> None:
    out_folder = tmp_path / UNSAID
    code, out, _ = python(terminal, str(ROOT / "data" / "build.py"), "--out", str(out_folder))
    assert code == 0 and "questions" in out
    assert (out_folder / "train.jsonl").is_file()
    program = """
import sys, chaos.__main__ as program
def interrupt(*_):
    raise KeyboardInterrupt
program.run_session = interrupt
sys.exit(program.main(["--kills", "1", "--seed", "1"]))
"""
    code, out, err = python(terminal | {"TMPDIR": str(out_folder)}, "-c", program)
    assert code == 1 and "chaos: 1 kills" in out and "interrupted" in err


# --- the parts


def test_small_files_take_any_name(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", f"# {NO_TEXT} {UNSAID}\n")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == f"# \\udcff {UNSAID}\n"
    write_json(tmp_path / "note.json", {"file": NO_TEXT})
    assert read_json(tmp_path / "note.json", "") == {"file": NO_TEXT}


def test_text_that_was_typed_is_read_as_utf_8() -> None:
    assert typed_text(UNSAID) == UNSAID
    assert typed_text("".join(chr(0xDC00 + byte) for byte in UNSAID.encode() if byte > 127)) == UNSAID[2:]
    with pytest.raises(UnicodeDecodeError):
        typed_text(NO_TEXT)
