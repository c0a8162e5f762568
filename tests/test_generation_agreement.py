"""benchmarks.generation_agreement: what it says about two scores of one run, on a CPU with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.generation_agreement import closeness, compared
from finetune.evaluation.run import evaluate_run
from finetune.models.device import Device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.run_folder import RunFolder
from finetune.tokens import encode_prompts
from tests.helpers.data_examples import read_jsonl
from tests.helpers.run_examples import copy_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scored(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """The same run, answered in float32 and in bfloat16."""
    found = []
    for dtype in ("float32", "bfloat16"):
        run = copy_run(
            tiny_run,
            tmp_path_factory.mktemp(dtype),
            evaluation={"dtype": dtype, "dequantize": True, "max_new_tokens": 12},
        )
        evaluate_run(run, progress=False)
        found.append(run)
    return found[0], found[1]


def changed(run: RunFolder, folder: Path, number: int, answer: str) -> RunFolder:
    """A copy with another answer and verdict of the tuned model to one question."""
    copy = copy_run(run.path, folder)
    rows = read_jsonl(copy.eval_rows("tuned"))
    rows[number] |= {"answer": answer, "verdict": "made_up"}
    copy.eval_rows("tuned").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def logits_after(run: RunFolder, prompt: str, beginning: list[int]) -> torch.Tensor:
    config = run.config()
    base = load_base(config.model, config.quantization, Device(torch.device("cpu"), torch.float32), dequantize=True)
    model: Any = load_adapter(base, run.adapter, config.lora, config.model).eval()
    [ids] = encode_prompts(load_tokenizer(config.model), [prompt])
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[*ids, *beginning]])).logits[0, -1]
    return found


def test_a_score_agrees_with_itself(scored: tuple[RunFolder, RunFolder]) -> None:
    found = compared(scored[0], scored[0])
    for kind in ("base", "tuned"):
        assert found[kind]["same_answer"] == found[kind]["same_verdict"] == 1
        assert found[kind]["differing_verdicts"] == [] and found[kind]["dtypes"] == ["float32", "float32"]


def test_another_token_is_shown_with_the_best_two_and_is_no_tie(
    scored: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    first = scored[0]
    row = read_jsonl(first.eval_rows("tuned"))[2]
    tokenizer: Any = load_tokenizer(first.config().model)
    ids = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    prompt = _prompt(first, row["id"])
    logits = logits_after(first, prompt, ids[:1])

    def survives(token: int) -> bool:
        """As text: an answer is read from a file and cut into tokens again."""
        text = tokenizer.decode([ids[0], token])
        return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == [ids[0], token])

    worst = next(token for token in logits.argsort().tolist() if survives(token))
    second = changed(first, tmp_path, 2, tokenizer.decode([ids[0], worst]))
    found = compared(first, second)["tuned"]
    assert (found["questions"], found["same_verdict"]) == (6, round(5 / 6, 4))
    [entry] = found["differing_verdicts"]
    assert (entry["id"], entry["token"], entry["verdicts"]) == (row["id"], 1, [row["verdict"], "made_up"])
    assert entry["tokens"] == [tokenizer.decode([ids[1]]), tokenizer.decode([worst])]
    values, best = logits.topk(2)
    assert [text for text, _ in entry["best"]] == [tokenizer.decode([token]) for token in best.tolist()]
    assert [value for _, value in entry["best"]] == pytest.approx(values.tolist(), abs=1e-4)
    assert entry["distance"] == pytest.approx(float(logits[ids[1]] - logits[worst]), abs=1e-4)
    assert entry["ulps"] > 1000 and not entry["tie"] and found["ties_of_differing_verdicts"] == "0 of 1"


def test_an_answer_that_goes_on_is_compared_with_the_end(scored: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    first = scored[0]
    row = read_jsonl(first.eval_rows("tuned"))[0]
    tokenizer: Any = load_tokenizer(first.config().model)
    ids = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    second = changed(first, tmp_path, 0, tokenizer.decode(ids[:2]))
    [entry] = compared(first, second)["tuned"]["differing_verdicts"]
    assert entry["token"] == 2 and entry["tokens"] == [tokenizer.decode([ids[2]]), tokenizer.eos_token]


def test_the_dtypes_of_both_scores_are_read(scored: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    """A unit of bfloat16 is that of 2**16 units of float32, and the coarser dtype counts."""
    ulps = []
    for number, run in enumerate(scored):
        second = changed(run, tmp_path / str(number), 1, "item")
        found = compared(scored[0], second)["tuned"]
        assert found["dtypes"] == ["float32", "float32" if number == 0 else "bfloat16"]
        ulps.append(found["differing_verdicts"][0]["ulps"])
    assert ulps[0] == pytest.approx(ulps[1] * 2**16, rel=0.05)


@pytest.mark.parametrize(
    ("values", "tokens", "dtypes", "ulps", "tie"),
    [
        ([16.0, 16.0625, 3.0], (0, 1), ["bfloat16", "bfloat16"], 0.5, True),
        ([16.0, 16.0625, 3.0], (0, 1), ["float32", "bfloat16"], 0.5, True),
        ([16.0, 16.0625, 3.0], (0, 1), ["float32", "float32"], 2**15, False),
        ([16.0, 16.0625, 3.0], (0, 1), ["float16", "float16"], 4, True),
        ([16.0, 16.0 + 2**-14, 3.0], (1, 0), ["float32", "float32"], 32, True),
        ([16.0, 17.0, 3.0], (0, 1), ["bfloat16", "bfloat16"], 8, False),
        ([16.0, 16.0625, 20.0], (0, 1), ["bfloat16", "bfloat16"], 0.5, False),
    ],
)
def test_a_tie_is_what_rounding_may_decide_between_the_best_two(
    values: list[float], tokens: tuple[int, int], dtypes: list[str], ulps: float, tie: bool
) -> None:
    found = closeness(torch.tensor(values), tokens, dtypes)
    assert (found["ulps"], found["tie"]) == (ulps, tie)


def test_scores_of_other_questions_and_runs_without_one_are_refused(
    scored: tuple[RunFolder, RunFolder], tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"eval\.json: not there.*finetune evaluate"):
        compared(scored[0], copy_run(tiny_run, tmp_path / "none"))
    second = copy_run(scored[0].path, tmp_path)
    rows = second.eval_rows("base").read_text().splitlines(keepends=True)
    second.eval_rows("base").write_text("".join(rows[1:]))
    with pytest.raises(SystemExit, match="rows of other questions"):
        compared(scored[0], second)


def test_the_command_prints_json(scored: tuple[RunFolder, RunFolder]) -> None:
    command = [sys.executable, "-m", "benchmarks.generation_agreement", *(str(run.path) for run in scored)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    assert json.loads(done.stdout).keys() == {"base", "tuned"}


def _prompt(run: RunFolder, question: str) -> str:
    from finetune.data.prompts import load_template
    from finetune.evaluation.questions import questions_of

    asked = questions_of(run.config(), load_template(run.adapter))
    [found] = [prompt for record, prompt in zip(asked.records, asked.prompts, strict=True) if record.id == question]
    return found
