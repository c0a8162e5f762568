"""The decoding loop on a CUDA GPU: graphs, and tokens that are read one step late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.evaluation.generators import steps
from tests.evaluation.generators.test_decoding import PROMPTS, answers, expected, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]
ROOMS = [12, 25, 1, 12, 3, 12, 12, 2, 12, 30, 12, 1, 7, 12]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Any:
    """Products in full float32, as the comparison of tokens needs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attn_implementation": "sdpa"}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {}),
        ("gemma2", {"sliding_window": 4096, "query_pre_attn_scalar": 8}),
    ],
)
def test_greedy_answers_are_those_of_generate(kind: str, changes: dict[str, Any]) -> None:
    model = tiny(kind, **changes).cuda()
    alone = [expected(model, prompt, room) for prompt, room in zip(PROMPTS, ROOMS, strict=True)]
    for batch_size in (1, 3, 16):
        found = answers(model, PROMPTS, ROOMS, batch_size)
        assert [found[number][0] for number in range(len(PROMPTS))] == alone, batch_size


def test_steps_are_graphs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[tuple[int, int]] = []
    capture = steps.Steps._capture

    def noting(self: Any, rows: int, columns: int) -> Any:
        made.append((rows, columns))
        return capture(self, rows, columns)

    monkeypatch.setattr(steps.Steps, "_capture", noting)
    answers(tiny("llama").cuda(), PROMPTS, ROOMS, 4)
    assert made and "without CUDA graphs" not in capsys.readouterr().err


def test_without_graphs_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama").cuda()
    expected_answers = answers(model, PROMPTS, ROOMS, 4)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(steps.Steps, "_capture", refuse)
    assert answers(model, PROMPTS, ROOMS, 4) == expected_answers
    assert capsys.readouterr().err.count("without CUDA graphs") == 1


def test_sampled_answers_are_those_of_a_cpu() -> None:
    model = tiny("llama")
    settings: dict[str, Any] = {"temperature": 1.0, "seeds": range(5, 5 + len(PROMPTS))}
    on_cpu = answers(model, PROMPTS, ROOMS, 4, **settings)
    assert answers(model.cuda(), PROMPTS, ROOMS, 4, **settings) == on_cpu
