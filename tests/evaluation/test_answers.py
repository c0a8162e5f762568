"""Answers are kept as they come: a killed evaluation goes on where it was, and ends as one that was not interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.errors import Interrupted
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.generators import hf
from finetune.evaluation.generators.base import Answer, Done
from finetune.evaluation.run import evaluate_run
from finetune.run_folder import RunFolder
from tests.helpers.data_examples import read_jsonl
from tests.helpers.errors import raises
from tests.helpers.run_examples import copy_run

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a", "bbb", "cc", "dddd", "eeeee"]
ORDER = ["eeeee", "dddd", "bbb", "cc", "a"]
"""The longest first, as a generator may answer them."""


class Speaker:
    """A model that answers each prompt with itself in capitals, the longest first, and may stop before one."""

    dtype_name = "words"

    def __init__(self, stop_before: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[str] = []
        self._stop, self._error = stop_before, error

    def answers(self, prompts: Sequence[str], *, done: Done, **_: Any) -> list[Answer]:
        answers = [Answer(prompt.upper() + "\n'é\u2028", len(prompt)) for prompt in prompts]
        for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
            if len(self.asked) == self._stop:
                raise self._error or KeyboardInterrupt
            self.asked.append(prompts[number])
            done(number, answers[number])
        return answers


def answer_file(path: Path, prompts: Sequence[str] = PROMPTS, batch_size: int = 2, **settings: Any) -> AnswerFile:
    file = AnswerFile(path, "base model", {"model": "m"} | settings, prompts, batch_size)
    file.read()
    return file


def generate(file: AnswerFile, model: Any) -> Any:
    file.generate(lambda: model, tuned=False, max_new_tokens=9, progress=False)
    return model


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "loading_seconds")}
        for line in read_jsonl_lines(path)
    ]


def by_question(path: Path) -> list[dict[str, Any]]:
    """The lines of a file without its header, whose order is that in which the answers came."""
    return sorted(without_seconds(path)[1:], key=lambda line: line["question"])


def read_jsonl_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A complete file."""
    path = tmp_path / "whole.jsonl"
    assert generate(answer_file(path), Speaker()).asked == ORDER
    return path


# the file


def test_answers_come_back_in_the_order_of_the_prompts(whole: Path) -> None:
    file = answer_file(whole)
    assert file.complete and file.dtype == "words"
    assert file.in_order() == [Answer(prompt.upper() + "\n'é\u2028", len(prompt)) for prompt in PROMPTS]
    generate(file, Speaker(stop_before=0))  # which is not asked


@pytest.mark.parametrize("stop", range(5))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_after_any_answer_only_the_rest_is_asked(tmp_path: Path, whole: Path, stop: int, error: BaseException) -> None:
    path = tmp_path / "part.jsonl"
    with pytest.raises(type(error)):
        generate(answer_file(path), Speaker(stop, error))
    assert generate(answer_file(path), Speaker()).asked == ORDER[stop:]
    assert by_question(path) == by_question(whole)
    assert answer_file(path).in_order() == answer_file(whole).in_order()


def test_a_file_that_ends_anywhere_is_taken_up_to_its_last_whole_answer(tmp_path: Path, whole: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "torn.jsonl"
    lines = content.splitlines(keepends=True)
    ends = [sum(map(len, lines[:count])) for count in range(2, len(lines) + 1)]
    for size in range(0, len(content) + 1, 23):
        path.write_bytes(content[:size])
        there = sum(size >= end - 1 for end in ends)  # the last line end alone may be missing
        model = generate(answer_file(path), Speaker())
        assert model.asked == ORDER[there:], size
        assert by_question(path) == by_question(whole), size


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"prompt_sha256": "', '"prompt_sha256": "0'),
        lambda text: text.replace('"format": 2', '"format": 1'),
        lambda text: text.replace('"new_tokens": ', '"tokens": '),
        lambda text: text.replace('"question": ', '"question": 1'),
        lambda text: text.replace('"settings"', '"other"'),
        lambda text: text.replace('{"model": "m"}', '{"model": "n"}'),
        lambda text: "[]\n" + text,
        lambda text: text[text.index("\n") + 1 :],
        lambda text: "\0" * 100,
        lambda text: "",
    ],
)
def test_answers_that_are_not_to_these_prompts_and_settings_are_asked_again(
    whole: Path, damage: Callable[[str], str]
) -> None:
    before = without_seconds(whole)
    whole.write_text(damage(whole.read_text(encoding="utf-8")), encoding="utf-8")
    assert generate(answer_file(whole), Speaker()).asked == ORDER
    assert without_seconds(whole) == before


def test_another_adapter_or_other_prompts_find_nothing(whole: Path) -> None:
    assert not answer_file(whole, adapter="0f").answers
    assert not answer_file(whole, [*PROMPTS, "f"]).answers
    assert not answer_file(whole, PROMPTS[::-1]).answers


def test_an_incomplete_file_of_another_batch_size_is_taken(tmp_path: Path, whole: Path) -> None:
    assert answer_file(whole, batch_size=3).complete
    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(answer_file(path), Speaker(stop_before=1))
    assert generate(answer_file(path, batch_size=3), Speaker()).asked == ORDER[1:]


def test_answers_are_on_the_disk_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted bucket uploads the whole file at each write: not one for each answer, nor one for all of them."""
    now = iter(range(0, 1000, 1))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) * 0.6)
    path, sizes = tmp_path / "a.jsonl", []
    file = answer_file(path)
    speaker: Any = Speaker
    file.generate(
        speaker,
        tuned=False,
        max_new_tokens=9,
        progress=False,
        told=lambda *_: sizes.append(len(read_jsonl_lines(path))),
    )
    assert sizes[0] <= 2 and sizes[2] >= 3 and len(read_jsonl_lines(path)) == 6


def test_the_seconds_of_all_attempts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of each attempt to its last answer."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Speaker):
        def answers(self, prompts: Sequence[str], *, done: Done, **settings: Any) -> list[Answer]:
            def later(number: int, answer: Answer) -> None:
                now[0] += 2.5
                done(number, answer)

            return super().answers(prompts, done=later, **settings)

    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(answer_file(path), Slow(stop_before=2))
    assert answer_file(path).seconds == pytest.approx(5)
    now[0] += 1000  # between the attempts
    file = answer_file(path)
    generate(file, Slow())
    assert file.seconds == pytest.approx(12.5) and answer_file(path).seconds == pytest.approx(12.5)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = answer_file(tmp_path / "part.jsonl")
    model = Speaker()
    monkeypatch.setattr(file, "_write_kept", lambda: None)
    file.path = Path("/dev/full")
    with raises("disk.full"):
        generate(file, model)


# a real evaluation


def evaluation_of(run: RunFolder) -> tuple[Any, ...]:
    """Everything that an evaluation leaves, without the seconds that it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: timeless(item)
                for key, item in value.items()
                if key not in ("seconds", "adapter", "judging", "cost")
            }
        return value

    scores = timeless(json.loads(run.eval_json.read_text()))
    rows = [[timeless(line) for line in read_jsonl(run.eval_rows(name))] for name in ("base", "tuned")]
    kept = [path for path in run.path.glob("eval/answers/*.jsonl") if not path.name.endswith(".attempts.jsonl")]
    kept += run.path.parent.glob("base/*/answers.jsonl")
    return scores, rows, [(path.name, without_seconds(path)[0], by_question(path)) for path in sorted(kept)]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer of the real model takes a little longer and is written at once, so that there is time to kill it."""
    real = hf.generate_answers

    def generate(*arguments: Any, done: Done, **settings: Any) -> Any:
        def slowly(number: int, answer: Answer) -> None:
            done(number, answer)
            time.sleep(0.1)

        return real(*arguments, done=slowly, **settings)

    monkeypatch.setattr(hf, "generate_answers", generate)
    monkeypatch.setattr("finetune.evaluation.answers.WRITE_SECONDS", 0.0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # whose threads a forked process does not have


def killed_after(run: RunFolder, answers: int) -> None:
    """Evaluate in a child process, which gets SIGKILL as soon as so many answers are kept."""
    child = os.fork()
    if not child:
        try:
            evaluate_run(run, progress=False)
        finally:
            os._exit(0)
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        files = [*run.path.glob("eval/answers/*.jsonl"), *run.path.parent.glob("base/*/answers.jsonl")]
        if sum(path.read_bytes().count(b"\n") - 1 for path in files) >= answers:
            break
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended already"


def test_an_evaluation_killed_and_called_again_ends_as_one_that_was_not(
    tiny_run: Path, tmp_path: Path, slow: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed while the base model answers, and while the tuned model does."""
    settings = {"batch_size": 1, "max_new_tokens": 6}
    plain = copy_run(tiny_run, tmp_path / "plain", evaluation=settings)
    evaluate_run(plain, progress=False)
    run = copy_run(tiny_run, tmp_path / "killed", evaluation=settings)
    for answers in (2, 8):
        killed_after(run, answers)
        assert not run.eval_json.exists()
    capfd.readouterr()
    evaluate_run(run, progress=False)
    assert "are there already; going on there" in capfd.readouterr().err
    assert evaluation_of(run) == evaluation_of(plain)


def test_ctrl_c_says_what_is_kept_and_exits_75_only_if_something_is(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", evaluation={"batch_size": 2})
    monkeypatch.setattr("transformers.core_model_loading.tqdm", lambda items, **_: items)
    real, left = hf.generate_answers, [0]

    def stopping(*arguments: Any, done: Done, **settings: Any) -> Any:
        def counted(number: int, answer: Answer) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            done(number, answer)

        return real(*arguments, done=counted, **settings)

    monkeypatch.setattr(hf, "generate_answers", stopping)
    with pytest.raises(Interrupted) as nothing:
        evaluate_run(run, progress=False)
    assert not nothing.value.resumable
    assert cli.main(["evaluate", str(run.path)]) == 130
    assert "finetune: interrupted: no answer was complete, so nothing is kept" in capsys.readouterr().err
    left[0] = 8
    assert cli.main(["evaluate", str(run.path)]) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert "6 of 6 answers of the base model" in said and "2 of 6 answers of the tuned model" in said
    assert not run.eval_json.exists()
    left[0] = 4
    assert cli.main(["evaluate", str(run.path)]) == 0
    assert json.loads(run.eval_json.read_text())["models"]["tuned"]["questions"] == 6


@pytest.mark.parametrize(
    ("number", "kept", "code"),
    [(signal.SIGINT, True, 75), (signal.SIGTERM, True, 75), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
def test_a_signal_ends_the_command_with_an_honest_exit_code(number: int, kept: bool, code: int) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from finetune.cli import evaluate, main
from finetune.errors import Interrupted

def work(_):
    try:
        os.kill(os.getpid(), {number})
        signal.sigtimedwait([], 30)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM) if {number} == signal.SIGTERM else None  # SkyPilot sends two
        raise Interrupted("what is kept", resumable={kept})

evaluate._of_config = work
sys.exit(main.main(["evaluate", "config.yaml"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "finetune: interrupted: what is kept\n")
