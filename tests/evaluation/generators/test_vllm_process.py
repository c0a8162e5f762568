"""What the worker's environment has, and what is taken out of its log. The worker itself: test_vllm.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.evaluation.generators.vllm_process import VllmProcess, end_of, environment, reason_in
from tests.helpers.errors import raises


def test_no_secret_gets_into_the_environment_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "openai_api_key",
    ):
        monkeypatch.setenv(name, "secret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    found = environment()
    assert "secret-value" not in found.values()
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert found["VLLM_USE_FLASHINFER_SAMPLER"] == "1", "the user's own setting"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == found["HF_HUB_OFFLINE"] == "1"
    assert found["TRITON_F32_DEFAULT"] == "ieee"  # what is called float32 is computed in float32


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", ""),
        ("INFO loading\nLoading: 50%|##   | 1/2 [00:01<00:01, 1.0it/s]\n", "INFO loading"),
        ("Traceback\n  File x\nRuntimeError: no kernel\nINFO: bye\n\n", "RuntimeError: no kernel"),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried\n[W] destroy\n",
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
        ("python: No module named finetune\r\n", "python: No module named finetune"),
    ],
)
def test_the_reason_of_a_failure_is_the_last_line_that_names_an_error(log: str, reason: str) -> None:
    assert reason_in(log) == reason


def test_the_end_of_a_log(tmp_path: Path) -> None:
    assert end_of(tmp_path / "none") == ""
    (tmp_path / "log").write_bytes(b"x" * 200_000 + b"\xffend")
    assert end_of(tmp_path / "log").endswith("x\ufffdend")


def test_a_python_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with raises("evaluation.no_vllm", match="vLLM's Python does not start"):
        VllmProcess(str(tmp_path / "python"), tmp_path / "log")


def test_a_worker_that_ends_at_once_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ImportError: no module named vllm' >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    with raises("evaluation.vllm_failed", match="ImportError: no module named vllm.*evaluation.generator=hf"):
        VllmProcess(str(program), tmp_path / "log").loaded(do="load")
