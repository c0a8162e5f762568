"""The command line: fast help with examples, one line for every user error, exit codes for scripts."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import arguments as arguments_module
from finetune.cli import config as config_module
from finetune.cli import main as cli
from finetune.config.load import load_config
from finetune.doctor import local as local_doctor
from finetune.doctor.check import Check, Need, absent
from finetune.errors import Interrupted, UserError
from finetune.run_folder import RunFolder
from tests.helpers.data_examples import make_database, row, write_jsonl
from tests.helpers.errors import reported
from tests.helpers.report_fixtures import build_run, rows, write_evaluation

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib", "jinja2", "sqlglot", "omegaconf", "numpy")


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and sub-command; () is the program itself."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*path, name))


COMMANDS = list(commands(cli._parser()))


@pytest.mark.parametrize("imported", [True, False])
def test_large_imports_leave_garbage_collection_on(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if imported:
        monkeypatch.setitem(sys.modules, "transformers", sys)
    else:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(ImportError), arguments_module.large_imports():
        assert gc.isenabled() == imported
        import finetune.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **settings,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without progress bars, everything on stderr is ours."""
    monkeypatch.setattr("transformers.core_model_loading.tqdm", lambda items, **_: items)


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Path:
    return tiny_config()


# help


def test_all_commands_exist() -> None:
    agreed = (
        "init, "
        "doctor, data prepare, data check, plan, launch, machine, train, sweep, evaluate, report, runs, watch, compare, export, "
        "serve, completion, ask, generate, config, demo, job train, job evaluate, job serve, job sweep, job dev"
    )
    assert {tuple(name.split()) for name in agreed.split(", ")} | {(), ("data",), ("job",)} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_that_parses(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.partition("\nexample:\n")[2].splitlines() if line.strip()]
    assert examples, text
    for example in examples:
        words = split(example)
        assert words[: 1 + len(command)] == ["finetune", *command]
        cli._parser().parse_args(words[1:])


def split(example: str) -> list[str]:
    return shlex.split(example.partition("   (")[0])


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import contextlib, io, sys
for name in {HEAVY}: sys.modules[name] = None
from finetune.cli import main as cli; from finetune.doctor import local as doctor
for command in {COMMANDS}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([*command, "--help"])
    assert "example:" in out.getvalue(), command
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_help_answers_within_half_a_second_of_processor_time() -> None:
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "finetune", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert statistics.median(seconds) < 0.5, seconds


# exit codes


def test_python_dash_m_finetune_is_the_command(config: Path) -> None:
    done = run("config", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    assert "max_steps: 4" in done.stdout
    done = run("config", "missing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "finetune: missing.yaml: no such config file; see configs/ for examples\n"


def test_an_old_console_script_still_works(config: Path) -> None:
    program = (
        "import sys\nfrom finetune.cli import main\nif __name__ == '__main__':\n    sys.exit(main())"  # as pip wrote it
    )
    words = [sys.executable, "-c", program, "config"]
    done = subprocess.run([*words, str(config)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "max_steps: 4" in done.stdout
    done = subprocess.run([*words, "missing.yaml"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("finetune: missing.yaml: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unheard-of"],
        ["data"],
        ["train"],
        ["--unheard-of"],
        ["train", "a.yaml", "--unheard-of"],
        ["evaluate", "runs/a", "--unheard-of"],
        ["report", "runs/a", "b"],
        ["generate", "runs/a", "question"],
        ["config", "a.yaml", "--run"],
    ],
)
def test_a_wrong_flag_or_argument_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: finetune")


MISTAKES: list[tuple[str, str, str]] = [
    ("config {tmp}/none.yaml", "config.not_found", "none.yaml"),
    ("config {config} lora.rank=4", "config.unknown_key", "lora.rank"),
    ("config {config} lora.r=many training.max_steps=0", "config.bad_type", "lora.r"),
    ("config {config} lora.r", "config.bad_override", "lora.r"),
    ("config {tmp}/broken.yaml", "config.bad_yaml", "broken.yaml"),
    ("data check {tmp}/none.yaml", "config.not_found", "none.yaml"),
    ("data check {config} data.sources[0].path=x", "config.bad_override", "data.sources[0].path"),
    ("data prepare {config} data.output_dir={tmp}", "data.output_dir_taken", "data.output_dir"),
    ("data prepare {config} model.name={tmp}/none", "model.not_found", "none"),
    ("train {config} data.output_dir={tmp}/none", "file.missing", "`finetune data prepare CONFIG`"),
    ("train {config} model.name={tmp}", "model.incomplete", "config.json"),
    ("train {config} model.torch_dtype=float16", "model.bad_dtype", "model.torch_dtype"),
    ("train {config} lora.target_modules=[query]", "lora.unknown_modules", "query"),
    ("train {config} model.name=org/name", "model.no_revision", "model.revision"),
    ("train --resume {tmp}/none", "run.not_found", "none"),
    ("train --resume {tmp} lora.r=8", "cli.conflicting_options", "remove the overrides, or edit that config"),
    ("evaluate {tmp}/none", "run.not_found", "no such run folder or config file"),
    ("evaluate {tmp}", "run.not_found", "{tmp}"),
    ("evaluate {config} --no-base", "cli.conflicting_options", "--no-base needs a run folder"),
    (
        "evaluate {tmp} lora.r=8",
        "cli.conflicting_options",
        "lora.r=8: a run is evaluated with the config in its folder",
    ),
    ("evaluate {config} data.output_dir={tmp}/none", "file.missing", "`finetune data prepare CONFIG`"),
    ("report {tmp}", "run.not_found", "{tmp}"),
    ("generate {tmp} --db {tmp}/x.sqlite question", "run.not_found", "{tmp}"),
]


@pytest.mark.parametrize(("command", "code", "said"), MISTAKES, ids=[command for command, *_ in MISTAKES])
def test_every_user_error_is_one_line_and_exit_code_2(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, code: str, said: str
) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n\n  unclosed")
    before = sorted(tmp_path.rglob("*"))
    with reported(code):
        assert cli.main(command.format(config=config, tmp=tmp_path).split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("finetune: ") and err.count("\n") == 1 and said.format(tmp=tmp_path) in err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_a_message_of_several_lines_is_joined(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise UserError("first line\nsecond line", code="any.mistake")

    monkeypatch.setattr(config_module, "_config", fail)
    assert cli.main(["config", str(config)]) == 2
    assert capsys.readouterr().err == "finetune: first line second line\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "finetune: interrupted\n"),
        (
            Interrupted("2 of 6 answers are kept", resumable=True),
            75,
            "finetune: interrupted: 2 of 6 answers are kept\n",
        ),
        (Interrupted("nothing was kept", resumable=False), 130, "finetune: interrupted: nothing was kept\n"),
        (Interrupted("nothing was kept", resumable=False, code=143), 143, "finetune: interrupted: nothing was kept\n"),
    ],
)
def test_ctrl_c_exits_with_the_transient_code_only_if_something_was_kept(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(config_module, "_config", interrupted)
    assert cli.main(["config", str(config)]) == code
    assert capsys.readouterr() == ("", message)


def test_the_commands_that_continue_by_themselves_exit_with_the_transient_code() -> None:
    parser = cli._parser()
    going_on = [["train", "c"], ["demo", "c"], ["job", "train"], ["job", "evaluate"], ["job", "dev"]]
    others = [
        ["evaluate", "r"],
        ["data", "prepare", "c"],
        ["data", "check", "c"],
        ["report", "r"],
        ["config", "c"],
        ["doctor"],
    ]
    assert all(parser.parse_args(words).continues for words in going_on)
    assert not any(parser.parse_args(words).continues for words in others)


def test_a_broken_pipe_is_not_an_error(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, the broken pipe would be noticed earlier
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "config", str(config)],
        cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# config, data


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_a_resolved_config_loads_again_as_itself(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["lora.r=8", "training.num_train_epochs=0.5", "model.revision=null", "lora.target_modules=[q_proj]"]
    assert cli.main(["config", str(path), *overrides]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    loaded = load_config(printed)
    assert loaded == load_config(path, overrides)
    assert (loaded.lora.r, loaded.training.num_train_epochs, loaded.lora.target_modules) == (8, 0.5, ["q_proj"])


def data_config(tmp_path: Path, tiny_config: Callable[..., Path], records: list[Any]) -> Path:
    make_database(tmp_path / "databases", items=20)
    source = {
        "kind": "jsonl",
        "path": str(write_jsonl(tmp_path / "records.jsonl", records)),
        "databases": str(tmp_path / "databases"),
    }
    return tiny_config(data={"sources": [source], "output_dir": str(tmp_path / "out"), "val_fraction": 0.0})


GOOD = [row(n, split=split) for n, split in enumerate(["train"] * 4 + ["test"] * 2)]


def test_data_check_of_good_data_exits_with_0_and_writes_nothing(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD)
    assert cli.main(["data", "check", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: 4 train, 0 val, 2 test, 0 rejected\n"
    assert not (tmp_path / "out").exists()


def test_data_check_counts_what_is_too_long_for_the_model(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD)
    assert cli.main(["data", "check", str(config), "model.max_seq_length=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 4 of 4 examples are longer than model.max_seq_length=40 tokens and are left out")
    assert lines[1].startswith(
        "test: 2 of 2 prompts are longer than model.max_seq_length=40 tokens: they are asked, but"
    )
    assert lines[2] == f"{config}: 4 train, 0 val, 2 test, 0 rejected"
    assert cli.main(["data", "check", str(config), "evaluation.max_new_tokens=100000"]) == 0
    assert "2 of 2 prompts leave less than evaluation.max_new_tokens=100000 of" in capsys.readouterr().out
    with_model = tmp_path / "small"
    shutil.copytree(load_config(config).model.name, with_model)
    values = json.loads((with_model / "config.json").read_text())
    (with_model / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 60}))
    assert cli.main(["data", "check", str(config), f"model.name={with_model}"]) == 0
    assert (
        "2 of 2 prompts leave no room in the model's 60 positions and are scored as too_long" in capsys.readouterr().out
    )


def test_data_check_goes_on_without_the_model(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD)
    assert cli.main(["data", "check", str(config), f"model.name={tmp_path / 'nowhere'}"]) == 0
    assert "tokens are not counted: model.name: no folder" in capsys.readouterr().err


def test_data_check_prints_control_characters_as_escapes(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = row(9, split="train") | {"sql": "SELECT \x1b[31m FROM item"}
    config = data_config(tmp_path, tiny_config, [*GOOD, bad])
    assert cli.main(["data", "check", str(config)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_data_check_lists_every_rejected_record_and_exits_with_1(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    many = [row(n, split="train") for n in range(6, 20)]
    bad = [row(30, sql="SELECT nmae FROM item"), row(31, question=GOOD[0]["question"].upper(), split="train")]
    config = data_config(tmp_path, tiny_config, [*GOOD, *many, *bad])
    assert cli.main(["data", "check", str(config)]) == 1
    records = tmp_path / "records.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        f"{records}:21: gold_fails: no such column: nmae",
        f"{records}:22: duplicate_question: asks the same as {records}:1",
        f"{config}: 18 train, 0 val, 2 test, 2 rejected",
    ]
    assert not (tmp_path / "out").exists()


def test_data_check_reports_what_would_fail_in_prepare_and_exits_with_1(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD[:4])
    assert cli.main(["data", "check", str(config)]) == 1
    assert "the split test is empty" in capsys.readouterr().out


def test_data_prepare_writes_once_and_prints_the_counts(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD)
    assert cli.main(["data", "prepare", str(config)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'out'}: written, 6 read, 4 train, 0 val, 2 test, 0 rejected\n"
    ), "and nothing of a limit that is not set"
    assert cli.main(["data", "prepare", str(config)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: unchanged, 6 read")


def test_the_plan_after_data_prepare_keeps_the_sources_for_which_the_data_are_prepared(
    tmp_path: Path, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(tmp_path, tiny_config, GOOD)
    values = yaml.safe_load(config.read_text())
    sources = f"data.sources={json.dumps(values['data'].pop('sources'))}"
    assert cli.main(["data", "prepare", str(config), sources]) == 0
    assert f"finetune plan {config} {shlex.quote(sources)}   (" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["data", "check"], ["data", "prepare"], ["plan"], ["train"]], ids=" ".join)
def test_a_config_whose_sources_are_beside_it_is_typed_in_its_folder(
    command: list[str],
    tmp_path: Path,
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "records.jsonl", GOOD)
    config = tiny_config(data={"sources": [{"kind": "jsonl", "path": "records.jsonl"}], "output_dir": "out"})
    monkeypatch.chdir(tmp_path.parent)
    with reported("config.other_folder"):
        cli.main([*command, str(config.relative_to(tmp_path.parent))])
    assert f"`cd {tmp_path.name}`, and name the config {config.name}" in capsys.readouterr().err
    assert cli.main(["config", str(config)]) == 0, "which reads none of them"


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("evaluate {}", "prepared"),
        ("evaluate {} --predictions theirs.sql", "prepared"),
        ("train --resume {}", "prepared"),
        ("export {} --to merged", "prepared"),
        ("export {} --to merged --no-score", "model"),
        ("ask {} how --db shop.sqlite", "model"),
        ("serve {}", "model"),
    ],
)
def test_a_run_whose_data_and_model_are_in_its_project_is_typed_there(
    command: str,
    missing: str,
    tmp_path: Path,
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project, elsewhere = tmp_path / "pro ject", tmp_path / "elsewhere"
    for folder in (project / "prepared", project / "model", project / "runs" / "one", elsewhere):
        folder.mkdir(parents=True)
    config = tiny_config(model={"name": "model"}, data={"output_dir": "prepared"})
    config.rename(project / "runs" / "one" / "config.yaml")
    monkeypatch.chdir(elsewhere)
    with reported("config.other_folder"):
        cli.main([word.format("../pro ject/runs/one") for word in command.split()])
    said = capsys.readouterr().err
    assert f"../pro ject/runs/one: {missing} is in ../pro ject, and paths count from" in said
    assert "`cd '../pro ject'`, and name the run runs/one" in said
    monkeypatch.chdir(project / "runs")
    with reported("config.other_folder"):
        cli.main([word.format("one") for word in command.split()])
    assert "`cd ..`, and name the run runs/one" in capsys.readouterr().err


def test_a_run_that_was_moved_out_of_its_project_is_told_what_is_missing(
    tmp_path: Path, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    tiny_config(data={"output_dir": "no/prepared"}).rename(tmp_path / "run" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    with reported("adapter.missing"):
        cli.main(["evaluate", "run"])


# report


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A finished, evaluated run."""
    run = RunFolder(build_run(tmp_path / "demo"))
    run.config_yaml.write_text("")
    return run


def first_line(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["report", str(finished.path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert second == f"report: {finished.path / 'report.html'}"
    return first


BEFORE_AND_AFTER = "execution accuracy: 4.7% before, 33.3% after, on 150 questions"


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({}, "that training has not seen"),
        ({"split": "val"}, "of the val split"),
        ({"data_manifest_sha256": "0" * 64}, "of the test split"),
    ],
)
def test_the_report_calls_questions_unseen_only_if_they_are(
    finished: RunFolder, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], which: str
) -> None:
    base, tuned = rows(150)
    write_evaluation(finished.path, base=base, tuned=tuned, **changes)
    assert first_line(finished, capsys) == f"{BEFORE_AND_AFTER} {which}"


def test_the_report_of_a_run_that_was_not_evaluated_claims_nothing(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(finished.path, base=None, tuned=rows(150)[1])
    assert first_line(finished, capsys).startswith("execution accuracy: unknown before, 33.3% after, on 150 questions")
    finished.eval_json.unlink()
    assert first_line(finished, capsys) == "execution accuracy: unknown, because the run was not evaluated"


# doctor


@pytest.mark.parametrize(("arguments", "need"), [([], "train"), (["--cloud"], "cloud")])
def test_doctor_requires_only_what_is_requested(
    arguments: list[str], need: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(asked: Need, regions: list[str] | None = None) -> list[Check]:
        assert (regions is not None) == (asked == "cloud"), "the regions of the plan, whose quota matters"
        return [
            Check("torch", absent("train", asked), "none"),
            Check("sky", absent("cloud", asked), ""),
        ]

    monkeypatch.setattr(local_doctor, "examine", examine)
    assert cli.main(["doctor", *arguments]) == 1
    missing = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert missing == [{"train": "torch", "cloud": "sky"}[need]]
