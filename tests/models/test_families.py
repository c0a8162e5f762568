"""One entry of FAMILIES makes a model family known to shapes, memory, speed, the plan and the fused layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.config.schema import RunConfig, TrainingSection  # noqa: E402
from finetune.estimate.memory_table import memory_table  # noqa: E402
from finetune.machine.gpus import GPUS  # noqa: E402
from finetune.models.architectures import FAMILIES, Family, shape_of  # noqa: E402
from finetune.models.fused.model import unsupported_reason  # noqa: E402
from finetune.training.step.plan import plan_step  # noqa: E402
from tests.helpers.errors import raises  # noqa: E402
from tests.helpers.fused_examples import (  # noqa: E402
    CONFIGS,
    ON_CPU,
    fused_gradients,
    hf_gradients,
    lora_model,
    packed,
    texts,
    worst_error,
)
from tests.helpers.plan_examples import ALL, plan_of, priced, run_config  # noqa: E402
from tests.helpers.toy_llama import ToyLlamaConfig  # noqa: E402

NUMBERS = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toyllama", Family("ToyLlama", "ToyLlamaForCausalLM"))


@pytest.fixture
def toy_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(CONFIGS, "toyllama", ToyLlamaConfig)
    return lora_model("toyllama")


def model_folder(folder: Path, model_type: str) -> str:
    path = folder / model_type / "model"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(NUMBERS | {"model_type": model_type}))
    return str(path)


def test_a_family_without_an_entry_is_unknown_everywhere(tmp_path: Path, toy_model: Any) -> None:
    name = model_folder(tmp_path, "toyllama")
    assert shape_of(name) is None
    with raises("model.unknown_shape", match=r"not known.*\(Llama, Mistral and Qwen2 models\)"):
        memory_table(run_config(model={"name": name, "revision": None}), ["L4"])
    assert (unsupported_reason(toy_model, 30) or "").startswith("ToyLlamaForCausalLM is not one of LlamaForCausalLM")


@pytest.mark.usefixtures("registered")
def test_with_one_entry_its_shape_memory_hours_and_dollars_are_those_of_its_numbers(tmp_path: Path) -> None:
    toy, llama = (model_folder(tmp_path, model_type) for model_type in ("toyllama", "llama"))
    assert shape_of(toy) == shape_of(llama) is not None
    catalog = priced(tmp_path, **ALL)
    configs = [run_config(model={"name": name, "revision": None}) for name in (toy, llama)]
    tables = [memory_table(config, list(GPUS)).replace(config.model.name, "M") for config in configs]
    assert tables[0] == tables[1]
    assert plan_of(configs[0], catalog).rows == plan_of(configs[1], catalog).rows


@pytest.mark.usefixtures("registered")
def test_with_one_entry_the_fused_layer_computes_its_layers(toy_model: Any) -> None:
    ids, labels = texts()
    assert unsupported_reason(toy_model, 30) is None
    expected_loss, expected = hf_gradients(toy_model, ids, labels)
    loss, found = fused_gradients(toy_model, packed(ids, labels))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 1e-5
    config = RunConfig(training=TrainingSection(kernels="fused"))
    plan = plan_step(config, toy_model, ON_CPU, [len(row) for row in ids])
    assert (plan.backend, plan.limits.uncheckpointed_layers) == ("fused", 3)
