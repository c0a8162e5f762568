"""Where vLLM is looked for, and on which machines it is taken."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import LoraSection, ModelSection, RunConfig
from finetune.evaluation.generators import vllm_place
from finetune.evaluation.generators.vllm_place import engine_options, find_vllm, missing, require_vllm, weights_gib
from finetune.machine.hardware import DetectedGpu, TorchBuild
from finetune.models import load
from tests.helpers.errors import raises
from tests.helpers.fake_vllm.install import fake_vllm

ConfigWriter = Callable[..., Path]
T4, V100 = DetectedGpu("T4", 14.6, (7, 5)), DetectedGpu("V100", 16.0, (7, 0))
L4, A100 = DetectedGpu("L4", 22.0, (8, 9)), DetectedGpu("A100", 39.4, (8, 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[DetectedGpu | None], None]:
    """Call it to put a GPU into this machine."""

    def put(found: DetectedGpu | None) -> None:
        monkeypatch.setattr(vllm_place, "torch_build", lambda: TorchBuild("13.0", found))

    return put


@pytest.fixture
def mistral(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(load, "load_model_config", lambda section: type("Config", (), {"model_type": "mistral"}))
    return RunConfig(model=ModelSection(name="mistralai/Mistral-7B-v0.1"), lora=LoraSection())


def test_a_7b_model_is_answered_by_vllm_where_its_16_bit_weights_and_a_cache_fit(
    mistral: RunConfig, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    for name, found in ("L4", L4), ("A100", A100):
        gpu(found)
        assert missing(mistral, auto=True) is None, name
    gpu(T4)
    assert weights_gib(mistral, "float16") == pytest.approx(13.49, abs=0.01)
    assert "the T4 has 15 GiB, too few for weights of 13.5 GiB in 16 bits" in str(missing(mistral))
    mistral.model.name = "HuggingFaceTB/SmolLM2-135M"
    assert missing(mistral) is None
    gpu(V100)
    assert "needs compute capability 7.5, and the V100 has 7.0" in str(missing(mistral))
    gpu(None)
    assert "needs a GPU" in str(missing(mistral))


def test_float32_needs_twice_the_room(
    mistral: RunConfig, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(L4)
    mistral.evaluation.dtype = "float32"
    assert "the L4 has 22 GiB, too few for weights of 27.0 GiB in float32" in str(missing(mistral))
    gpu(A100)
    assert missing(mistral) is None


def test_an_adapter_apart_is_not_computed_in_float32(
    mistral: RunConfig, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's LoRA kernels assert it."""
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(A100)
    mistral.evaluation.adapter = "apart"
    assert missing(mistral) is None, "a 7B model answers in 16 bits"
    mistral.model.name = "HuggingFaceTB/SmolLM2-135M"
    assert "LoRA kernels compute in 16 bits, and these answers in float32" in str(missing(mistral))
    with raises("evaluation.no_vllm", match=r"evaluation\.adapter=auto merges"):
        require_vllm(mistral)
    mistral.evaluation.dtype = "bfloat16"
    assert missing(mistral) is None


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        (
            "qwen3_5_text",
            "float32",
            "vLLM computes the linear attention of models of type qwen3_5_text in 16 bits only",
        ),
        ("deepseek_v2", "float32", "vLLM computes the latent attention of models of type deepseek_v2 in 16 bits only"),
        ("gemma2", "float16", "vLLM does not compute models of type gemma2 in float16"),
        ("gemma2", "float32", None),
        ("qwen3_5_text", "bfloat16", None),
        ("qwen3_5_text", "float16", None),
    ],
)
def test_models_that_vllm_does_not_compute_in_a_dtype_are_known_beforehand(
    kind: str, dtype: str, why: str | None, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(A100)
    monkeypatch.setattr(load, "load_model_config", lambda section: type("Config", (), {"model_type": kind}))
    config = RunConfig(model=ModelSection(name="someone/else"))
    config.evaluation.dtype = dtype  # type: ignore[assignment]
    found = missing(config)
    assert found is None if why is None else str(found).startswith(why)


def test_options_that_quantise_leave_the_room_to_vllm(
    mistral: RunConfig, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(T4)
    monkeypatch.setenv(vllm_place.ENGINE_VARIABLE, '{"quantization": "bitsandbytes"}')
    assert missing(mistral) is None


def test_auto_takes_vllm_for_known_model_families_only(
    mistral: RunConfig, gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(A100)
    mistral.model.trust_remote_code = True
    assert "trust_remote_code" in str(missing(mistral, auto=True))
    assert missing(mistral) is None
    mistral.model.trust_remote_code = False
    monkeypatch.setattr(load, "load_model_config", lambda section: type("Config", (), {"model_type": "mamba"}))
    assert "type mamba" in str(missing(mistral, auto=True))
    assert missing(mistral) is None


def test_a_build_for_cpus_answers_where_it_is_asked_for(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config())
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0+cpu")
    assert missing(config) is None
    assert "needs a GPU" in str(missing(config, auto=True))


def test_vllm_is_looked_for_in_three_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistral: RunConfig, gpu: Callable[..., None]
) -> None:
    fake_vllm(tmp_path / "site", monkeypatch, version="0.24.0")
    gpu(A100)
    found = find_vllm()
    assert found is not None
    assert (found.python, found.version) == (sys.executable, "0.24.0")
    monkeypatch.delenv(vllm_place.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_vllm() is None
    assert "vLLM is not installed: FINETUNE_VLLM is not set" in str(missing(mistral))
    usual = tmp_path / "finetune-vllm/bin/python"
    usual.parent.mkdir(parents=True)
    usual.symlink_to(sys.executable)
    found = find_vllm()
    assert found is not None and found.python == str(usual)
    usual.unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = find_vllm()
    assert found is not None and found.python == sys.executable


@pytest.mark.parametrize("named", ["nowhere/python", "/bin/false", sys.executable])
def test_a_python_without_vllm_is_an_error(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_place.VARIABLE, named)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    vllm_place._probed.cache_clear()
    with raises("evaluation.bad_vllm", match="expected the Python of an environment with vLLM"):
        find_vllm()


@pytest.mark.parametrize("text", ["{", "[1]", "enforce_eager"])
def test_engine_options_that_are_no_object_are_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_place.ENGINE_VARIABLE, text)
    with raises("evaluation.bad_engine", match="as a JSON object"):
        engine_options()
