"""`finetune evaluate --predictions`: somebody else's answers are judged as a model's would be, and no file is misread."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.schema import SourceSection
from finetune.data.records import Record
from finetune.evaluation.questions import QuestionSet
from finetune.evaluation.score import Row
from finetune.run_name import fault_of_name
from tests.helpers.data_examples import files_of, jsonl_source, make_database, read_jsonl, row, run_prepare, write_jsonl
from tests.helpers.errors import reported
from tests.helpers.predictions_examples import (
    QUESTIONS,
    as_jsonl,
    prepare_two,
    questions_of,
    untrained_run,
    write_config,
)

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never write into it."""
    return prepare_two(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, prepared)


@pytest.fixture
def questions(prepared: Path) -> list[Record]:
    return questions_of(prepared)


def result_of(folder: Path, name: str = "theirs") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    place = folder / "runs" / "predictions" / name
    return json.loads((place / "eval.json").read_text()), read_jsonl(place / "rows.jsonl")


def judge(config: Path, content: str | bytes, *more: str, file: str = "theirs.sql") -> int:
    path = config.parent / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return main(["evaluate", str(config), "--predictions", str(path), *more])


def gold_lines(questions: list[Record]) -> list[str]:
    return [record.sql for record in questions]


# what is written and printed


def test_gold_is_right_everywhere_and_the_result_is_one_of_evaluate(
    config: Path, questions: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(config, "\n".join(gold_lines(questions)) + "\n") == 0
    result, rows = result_of(config.parent)
    scores = result["models"]["predictions"]
    assert (scores["correct"], scores["questions"], result["questions"]) == (QUESTIONS, QUESTIONS, QUESTIONS)
    assert set(scores["rules"]) == {"test_suite", "test_suite_no_distinct", "bird_set", "strict"}
    assert scores["execution_accuracy_interval95_by_database"] == [1.0, 1.0] and scores["by_gold"]
    assert (scores["new_tokens"], result["prompt_version"]) == (None, None), "not known of somebody else's answers"
    assert [Row(**line).id for line in rows] == [record.id for record in questions]
    assert {line["prompt_sha256"] for line in rows} == {""}
    assert result["predictions"]["format"] == "lines" and result["judging"]["rule"] == result["rule"] == "test_suite"
    printed = capsys.readouterr().out
    assert printed.startswith("theirs: execution accuracy 100.0% (6 of 6, 95% interval")


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{};",
        "```sql\\n{};\\n```",
        "The query is:\\n```sql\\n{}\\n```\\nIt lists them.",
        "SQL: {}",
    ],
    ids=["bare", "semicolon", "fence", "prose", "label"],
)
def test_the_text_is_read_as_a_models_answer_is(config: Path, questions: list[Record], form: str) -> None:
    answers = {record.id: form.replace("\\n", "\n").format(record.sql) for record in questions}
    assert judge(config, as_jsonl(answers)) == 0
    result, rows = result_of(config.parent)
    assert result["models"]["predictions"]["correct"] == QUESTIONS and result["predictions"]["format"] == "jsonl"
    assert [line["answer"] for line in rows] == list(answers.values())


@pytest.mark.parametrize("key", ["sql", "prediction", "answer"])
def test_the_keys_of_an_answer_in_any_order_of_lines(config: Path, questions: list[Record], key: str) -> None:
    lines = [json.dumps({"more": 1, "id": record.id, key: record.sql}) for record in reversed(questions)]
    assert judge(config, "\n\n".join(lines), file="theirs.jsonl") == 0
    assert result_of(config.parent)[0]["models"]["predictions"]["correct"] == QUESTIONS


def test_our_own_rows_are_taken_as_predictions(config: Path, questions: list[Record]) -> None:
    assert judge(config, "\n".join(gold_lines(questions))) == 0
    rows = config.parent / "runs" / "predictions" / "theirs" / "rows.jsonl"
    assert main(["evaluate", str(config), "--predictions", str(rows)]) == 0
    assert result_of(config.parent, "rows")[0]["models"]["predictions"]["correct"] == QUESTIONS


def test_blank_lines_and_nulls_are_no_answers(config: Path, questions: list[Record]) -> None:
    lines = gold_lines(questions)
    lines[1] = lines[-1] = "  "
    assert judge(config, "\n".join(lines) + "\n\n\n") == 0
    first = [line["verdict"] for line in result_of(config.parent)[1]]
    assert first == ["correct", "no_sql", "correct", "correct", "correct", "no_sql"]
    answers: dict[str, str | None] = {record.id: record.sql for record in questions}
    answers[questions[1].id] = None
    answers[questions[-1].id] = ""
    assert judge(config, as_jsonl(answers), "--name", "again") == 0
    assert [line["verdict"] for line in result_of(config.parent, "again")[1]] == first


def test_a_tab_and_the_database_behind_the_query_is_no_part_of_it(config: Path, questions: list[Record]) -> None:
    lines = [f"{record.sql}\t{record.db_id}" for record in questions]
    lines[0] = f"{questions[0].sql.replace(' ', chr(9))}\t{questions[0].db_id} "
    lines[1] = f"\t{questions[1].db_id}"
    assert judge(config, "\n".join(lines)) == 0
    rows = result_of(config.parent)[1]
    assert [line["verdict"] for line in rows] == ["correct", "no_sql", *["correct"] * 4]


def test_the_answers_of_windows_are_those_of_linux(config: Path, questions: list[Record]) -> None:
    content = "\ufeff" + "\r\n".join(f"{record.sql}\t{record.db_id}" for record in questions) + "\r\n"
    assert judge(config, content) == 0
    assert result_of(config.parent)[0]["models"]["predictions"]["correct"] == QUESTIONS
    assert (
        judge(config, "\ufeff" + as_jsonl({r.id: r.sql for r in questions}).replace("\n", "\r\n"), "--name", "b") == 0
    )
    assert result_of(config.parent, "b")[0]["models"]["predictions"]["correct"] == QUESTIONS


def test_only_a_line_feed_ends_a_line(config: Path, questions: list[Record]) -> None:
    """Not the characters at which str.splitlines also cuts."""
    lines = [f"{line} -- \x0b \x0c \x1c \x85 \u2028 \u2029 \r x" for line in gold_lines(questions)]
    assert judge(config, "\n".join(lines)) == 0
    assert len(result_of(config.parent)[1]) == QUESTIONS


@pytest.mark.parametrize(
    "answer",
    [
        "ATTACH DATABASE 'stolen.sqlite' AS s",
        "DROP TABLE item",
        "SELECT '\x00'",
        "SELECT '\ud800'",
        "\x1b]0;title\x07 SELECT",
        "(" * 5000,
        "SELECT " + "1," * 20_000 + "1",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT printf('%.*c', 500000000, 'x')",
    ],
    ids=["attach", "drop", "nul", "surrogate", "escape", "brackets", "columns", "endless", "large"],
)
def test_a_hostile_answer_is_a_wrong_one(
    prepared: Path, tmp_path: Path, questions: list[Record], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(prepared)
    config = write_config(tmp_path, prepared, timeout_seconds=0.5)
    answers = {record.id: record.sql for record in questions} | {questions[0].id: answer}
    assert judge(config, as_jsonl(answers)) == 0
    result, rows = result_of(tmp_path)
    assert result["models"]["predictions"]["correct"] == QUESTIONS - 1 and rows[0]["verdict"] != "correct"
    assert files_of(prepared) == before and not list(tmp_path.glob("**/stolen*"))
    assert "\x1b" not in capsys.readouterr().out


# where it is written


def test_for_a_run_the_result_lies_in_its_folder_and_its_eval_json_stays(
    prepared: Path, tmp_path: Path, questions: list[Record]
) -> None:
    run = untrained_run(write_config(tmp_path, prepared))
    run.eval_json.write_text("as it was")
    file = tmp_path / "theirs.sql"
    file.write_text("\n".join(gold_lines(questions)))
    assert main(["evaluate", str(run.path), "--predictions", str(file), "evaluation.rule=strict"]) == 0
    assert run.eval_json.read_text() == "as it was"
    assert {path.name for path in (run.path / "eval").iterdir()} == {
        "predictions-theirs.json",
        "predictions-theirs.jsonl",
    }
    result = json.loads(run.eval_predictions("theirs").read_text())
    assert result["models"]["predictions"]["rows"] == "eval/predictions-theirs.jsonl" and result["rule"] == "strict"
    assert not (tmp_path / "runs" / "predictions").exists()


def test_no_run_is_called_like_the_folder_of_the_results() -> None:
    assert fault_of_name("predictions") and fault_of_name("base") and not fault_of_name("predictions-1")


def test_the_same_answers_are_judged_again_and_others_need_another_name(config: Path, questions: list[Record]) -> None:
    lines = gold_lines(questions)
    assert judge(config, "\n".join(lines)) == 0
    assert judge(config, "\n".join(lines), "evaluation.rule=strict") == 0
    before = files_of(config.parent / "runs")
    assert result_of(config.parent)[0]["rule"] == "strict"
    with reported("predictions.name_taken"):
        assert judge(config, "\n".join([*lines[:-1], "SELECT 1"])) == 2
    assert files_of(config.parent / "runs") == before
    assert judge(config, "\n".join([*lines[:-1], "SELECT 1"]), "--name", "better") == 0
    assert result_of(config.parent, "better")[0]["models"]["predictions"]["correct"] == QUESTIONS - 1


def test_a_kill_between_the_two_files_leaves_no_old_scores_beside_new_verdicts(
    config: Path, questions: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.evaluation import predictions

    assert judge(config, "\n".join(gold_lines(questions))) == 0
    monkeypatch.setattr(predictions, "write_rows", lambda path, rows: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert judge(config, "\n".join(gold_lines(questions)), "evaluation.rule=strict") in (130, 143)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored from then on, also by what later tests start
    assert not (config.parent / "runs" / "predictions" / "theirs" / "eval.json").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "base", "Tuned", "x" * 101, "a\nb", "-x"])
def test_a_name_that_is_no_folder_name(config: Path, questions: list[Record], name: str) -> None:
    with reported("predictions.bad_name"):
        assert judge(config, "\n".join(gold_lines(questions)), f"--name={name}") == 2
    assert not (config.parent / "runs").exists()


# files that do not answer the questions: one line, nothing written


def refused(config: Path, content: str | bytes, code: str, *said: str, file: str = "theirs.sql") -> None:
    with redirect_stderr(io.StringIO()) as told, reported(code):
        assert judge(config, content, file=file) == 2
    message = told.getvalue()
    for text in (file, *said):
        assert text in message, message
    assert not (config.parent / "runs").exists()


def test_another_number_of_lines(config: Path, questions: list[Record]) -> None:
    lines = gold_lines(questions)
    refused(config, "\n".join(lines[:-1]), "predictions.wrong_count", ":5: 5 lines; expected 6", "test.jsonl")
    refused(config, "\n".join([*lines, "SELECT 1", "SELECT 2"]), "predictions.wrong_count", ":7: 8 lines; expected 6")


def test_lines_in_another_order(config: Path, questions: list[Record]) -> None:
    lines = [f"{record.sql}\t{record.db_id}" for record in questions]
    lines[3], lines[4] = lines[4], lines[3]
    refused(config, "\n".join(lines), "predictions.other_order", ":4:", "'shop'", "'port'", questions[3].id)
    answers = [{"id": record.id, "sql": record.sql, "db_id": record.db_id} for record in questions]
    answers[3]["db_id"] = "port"
    content = "".join(json.dumps(answer) + "\n" for answer in answers)
    refused(config, content, "predictions.other_order", ":4:", "'shop'", "'port'")


def test_ids_that_are_missing_unknown_or_there_twice(config: Path, questions: list[Record]) -> None:
    answers: dict[str, str | None] = {record.id: record.sql for record in questions}
    short = {name: answers[name] for name in list(answers)[2:]}
    refused(config, as_jsonl(short), "predictions.missing_ids", "2 of the 6 questions", repr(questions[0].id))
    refused(
        config,
        as_jsonl(answers | {"r0": "SELECT 1"}),
        "predictions.unknown_id",
        ":7:",
        "'r0'",
        "6 questions of the test",
    )
    twice = as_jsonl(answers) + as_jsonl({questions[1].id: None})
    refused(config, twice, "predictions.repeated_id", ":7:", repr(questions[1].id), "first in line 2")


def test_ids_that_are_numbers(config: Path, tmp_path: Path) -> None:
    """As pandas writes ids of digits."""
    rows = [row(number, id=str(number), split=split) for number, split in enumerate(["train", "val", "test", "test"])]
    make_database(tmp_path / "db", items=9)
    source = jsonl_source(write_jsonl(tmp_path / "n.jsonl", rows), databases=str(tmp_path / "db"))
    run_prepare([source], tmp_path / "numbers")
    config = write_config(tmp_path, tmp_path / "numbers")
    content = "".join(json.dumps({"id": number, "sql": rows[number]["sql"]}) + "\n" for number in (2, 3))
    assert judge(config, content) == 0
    assert result_of(tmp_path)[0]["models"]["predictions"]["correct"] == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "r3", "sql": ', "not JSON"),
        ('{"id": "r3", "sql": "a", "sql": "b"}', "twice"),
        ('{"sql": "SELECT 1"}', "the id of a question"),
        ('{"id": null, "sql": "SELECT 1"}', "the id of a question"),
        ('{"id": true, "sql": "SELECT 1"}', "the id of a question"),
        ('{"id": "r3"}', "sql or prediction or answer"),
        ('{"id": "r3", "sql": ["SELECT 1"]}', "expected text or null"),
        ('{"id": "r3", "sql": 1}', "expected text or null"),
        ("SELECT 1", "not JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"id": "r3", "sql": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_a_line_that_is_no_answer(config: Path, questions: list[Record], line: str, said: str) -> None:
    refused(config, as_jsonl({questions[1].id: "SELECT 1"}) + line + "\n", "predictions.bad_line", ":2:", said)


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff", "\ufeff\r\n"])
def test_an_empty_file(config: Path, content: str) -> None:
    refused(config, content, "predictions.empty")


def test_text_that_is_not_utf_8(config: Path, questions: list[Record]) -> None:
    lines = gold_lines(questions)
    lines[2] += " -- größer"
    refused(config, "\n".join(lines).encode("latin-1"), "predictions.bad_encoding", ":3:", "not UTF-8")
    refused(config, "\n".join(lines).encode("utf-16"), "predictions.bad_encoding", "UTF-16")


def test_a_json_array_or_object_over_several_lines(config: Path, questions: list[Record]) -> None:
    answers = [{"id": record.id, "sql": record.sql} for record in questions]
    refused(config, json.dumps(answers, indent=1), "predictions.bad_file", ":1:", "a JSON array", "jq -c '.[]'")
    refused(config, json.dumps(answers), "predictions.bad_file", "a JSON array")
    refused(config, json.dumps({"0": "SELECT 1"}, indent=1), "predictions.bad_line", ":1:", "one object a line")


def test_what_is_no_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in (".", "absent.sql", "pipe", "socket", "theirs.yaml/x"):
            with reported("predictions.not_found"):
                assert main(["evaluate", str(config), "--predictions", str(tmp_path / name), "--name", "x"]) == 2
    assert "absent.sql: no such file; expected a file with one SQL query a line" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_options_that_do_not_go_together(config: Path, questions: list[Record], tmp_path: Path) -> None:
    for more in (["--no-base"], ["--no-base", "--name", "x"]):
        with reported("cli.conflicting_options"):
            assert judge(config, "\n".join(gold_lines(questions)), *more) == 2
    with reported("cli.conflicting_options"):
        assert main(["evaluate", str(config), "--name", "x"]) == 2
    with reported("run.not_found"):
        assert main(["evaluate", str(tmp_path / "absent"), "--predictions", str(config)]) == 2
    with reported("run.not_found"):
        assert main(["evaluate", str(tmp_path), "--predictions", str(config)]) == 2


# which questions


def test_a_sample_of_the_questions_takes_the_answers_of_the_whole_split(
    prepared: Path, tmp_path: Path, questions: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, prepared, max_questions=2)
    lines = gold_lines(questions)
    assert judge(config, "\n".join(lines)) == 0
    result, rows = result_of(tmp_path)
    assert (result["questions"], result["models"]["predictions"]["correct"]) == (2, 2)
    assert result["predictions"]["left_out"] == 4
    assert "4 of its answers are to questions that are not asked" in capsys.readouterr().err
    asked = [line["id"] for line in rows]
    assert judge(config, as_jsonl(dict.fromkeys(asked)), "--name", "asked") == 0
    with reported("predictions.wrong_count"):
        assert judge(config, "\n".join(lines[:2]), "--name", "short") == 2
    assert "also those that evaluation.max_questions=2 leaves out" in capsys.readouterr().err
    with reported("predictions.missing_ids"):
        assert judge(config, as_jsonl({asked[0]: "SELECT 1"}), "--name", "short") == 2
    assert "1 of the 2 questions that are asked have no line" in capsys.readouterr().err


def test_questions_without_a_database_need_a_line_and_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_two(tmp_path, with_database=4)
    config, questions = write_config(tmp_path, prepared), questions_of(prepared)
    assert judge(config, "\n".join(gold_lines(questions))) == 0
    result, rows = result_of(tmp_path)
    assert (len(rows), result["without_database"], result["predictions"]["left_out"]) == (4, 2, 2)
    assert "2 of 6 test records come without a database" in capsys.readouterr().err
    with reported("predictions.wrong_count"):
        assert judge(config, "\n".join(gold_lines(questions)[:4]), "--name", "short") == 2
    assert "max_questions" not in capsys.readouterr().err


def test_no_record_with_a_database(tmp_path: Path) -> None:
    prepared = prepare_two(tmp_path, with_database=0)
    with reported("data.no_database"):
        assert judge(write_config(tmp_path, prepared), "SELECT 1\n" * QUESTIONS) == 2
    assert not (tmp_path / "runs").exists()


def test_data_that_are_not_prepared(config: Path, tmp_path: Path) -> None:
    with reported("file.missing"):
        assert judge(config, "SELECT 1\n", f"data.output_dir={tmp_path / 'absent'}") == 2


def test_data_that_are_prepared_with_other_settings(
    config: Path, questions: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("data.other_settings"):
        assert judge(config, "\n".join(gold_lines(questions)), "data.test_fraction=0.3") == 2
    assert "was prepared with data.test_fraction 0.2, this config has 0.3; run" in capsys.readouterr().err
    run = untrained_run(config)
    run.config_yaml.write_text(run.config_yaml.read_text().replace("test_fraction: 0.2", "test_fraction: 0.3"))
    (tmp_path / "gold.sql").write_text("\n".join(gold_lines(questions)))
    assert main(["evaluate", str(run.path), "--predictions", str(tmp_path / "gold.sql")]) == 0


# a laptop without torch, and the official verdicts


def test_neither_torch_nor_any_other_heavy_package_is_needed(config: Path, questions: list[Record]) -> None:
    from tests.test_import_table import HEAVY

    file = config.parent / "theirs.sql"
    file.write_text("\n".join(gold_lines(questions)))
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    arguments = ["evaluate", str(config), "--predictions", str(file)]
    program = f"import sys; {blocked}; from finetune.cli.main import main; sys.exit(main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "execution accuracy 100.0%" in done.stdout


def test_judging_asks_for_no_prompt(config: Path, questions: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: QuestionSet) -> list[str]:
        raise AssertionError("rendered prompts")

    monkeypatch.setattr(QuestionSet, "prompts", property(asked))
    assert judge(config, "\n".join(gold_lines(questions))) == 0


OFFICIAL = {"test_suite": "ts_keep_distinct", "test_suite_no_distinct": "ts_default", "bird_set": "bird_set"}


@pytest.mark.skipif(not (SHARED / "evaluator_cases.jsonl").is_file(), reason="no shared data here")
def test_published_predictions_get_the_official_verdicts(tmp_path: Path) -> None:
    """One question for each of the 800 cases, and one file with their predictions. Where ours is another verdict, the official
    evaluators have run a text that holds more than the query."""
    cases = read_jsonl(SHARED / "evaluator_cases.jsonl")
    entries = [
        {"db_id": c["db_id"], "query": c["gold"], "question": f"{n}: {c['question']}"} for n, c in enumerate(cases)
    ]
    (tmp_path / "dev.json").write_text(json.dumps(entries))
    databases = str(SHARED / "evaluator_databases")
    sources = [
        SourceSection("spider", str(tmp_path), files=["dev.json"], databases=databases, split="test"),
        jsonl_source(write_jsonl(tmp_path / "more.jsonl", [row(1, split="train"), row(2, split="val")])),
    ]
    run_prepare(sources, tmp_path / "prepared")
    config, asked = write_config(tmp_path, tmp_path / "prepared"), questions_of(tmp_path / "prepared")
    given = {record.id: cases[int(record.question.partition(":")[0])] for record in asked}
    assert judge(config, as_jsonl({name: case["pred"] for name, case in given.items()})) == 0
    other = []
    for line in result_of(tmp_path)[1]:
        case = given[line["id"]]
        found = {official: int(line["verdicts"][ours] == "correct") for ours, official in OFFICIAL.items()}
        if found != {official: case[official] for official in OFFICIAL.values()}:
            other.append((case["id"], bool(re.match('near "(I|```sql .*)": syntax error', case["pred_error"]))))
    prose, fence = ("dbgpthub_lora-1031", "dbgpthub_lora-1032"), "edge_markdown_fence-621"
    assert (len(asked), other) == (800, [(name, True) for name in (*prose, fence)])
