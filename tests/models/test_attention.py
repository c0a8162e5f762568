"""Attention is chosen by the model, too: nothing that a model's attention has is left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.models import attention
from finetune.models.attention import attention_for, soft_cap
from finetune.models.device import Device
from finetune.models.load import load_base
from tests.helpers.errors import raises
from tests.helpers.model_examples import CPU, WHOLE, change, named
from tests.helpers.tiny_architectures import ARCHITECTURES, tiny_config, tiny_model_of

GPU = Device(torch.device("cuda"), torch.float32)
HALF_GPU = Device(torch.device("cuda"), torch.bfloat16)
GEMMA_2 = "soft caps and windows (Gemma 2)"
SINKS = "attention sinks (gpt-oss)"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found / found.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auto_on_a_gpu_computes_what_eager_computes(name: str, ids: torch.Tensor) -> None:
    config = tiny_config(name)
    chosen = attention_for("auto", GPU, config)
    eager = logits(tiny_model_of(config, "eager"), ids)
    torch.testing.assert_close(logits(tiny_model_of(config, chosen), ids), eager, rtol=0, atol=1e-5)


def test_sdpa_would_leave_the_soft_cap_out(ids: torch.Tensor) -> None:
    config = tiny_config(GEMMA_2, attn_logit_softcapping=5.0)
    eager, sdpa = (logits(tiny_model_of(config, kind), ids) for kind in ("eager", "sdpa"))
    assert (eager - sdpa).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "attn_logit_softcapping=50"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30"),
        ({"attn_logit_softcapping": None}, None),
        ({"attn_logit_softcapping": None, "attention_logit_cap": 20.0}, "attention_logit_cap=20"),
    ],
)
def test_a_soft_cap_is_found_under_any_of_its_names(changes: dict[str, Any], found: str | None) -> None:
    config = tiny_config(GEMMA_2, **changes)
    assert soft_cap(config) == found
    assert attention_for("auto", GPU, config) == ("eager" if found else "sdpa")


def test_a_soft_cap_of_the_text_part_counts() -> None:
    class Whole:
        text = tiny_config(GEMMA_2)

        def get_text_config(self, decoder: bool) -> Any:
            return self.text

        def to_dict(self) -> dict[str, Any]:
            return {"text_config": {}}

    assert soft_cap(Whole()) == "attn_logit_softcapping=50"


def test_a_cap_of_the_head_does_not_change_attention() -> None:
    assert attention_for("auto", GPU, tiny_config("a soft cap of the head alone (Gemma 3)")) == "sdpa"


@pytest.mark.parametrize("name", [GEMMA_2, SINKS, "no SDPA (GPT-J)"])
def test_sdpa_is_refused_for_a_model_that_it_does_not_compute(name: str) -> None:
    for device in (GPU, CPU):
        with raises("model.attention", match=r"^model\.attn_implementation: .*use auto"):
            attention_for("sdpa", device, tiny_config(name))


def test_a_flash_attn_without_soft_cap_is_refused_and_one_with_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(GEMMA_2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with raises("model.attention", match="this version of flash_attention_2 leaves out .*attn_logit_softcapping=50"):
        attention_for("flash_attention_2", HALF_GPU, config)
    assert attention_for("auto", HALF_GPU, config) == "eager"
    monkeypatch.setattr(attention, "flash_has_soft_cap", lambda: True)
    assert attention_for("flash_attention_2", HALF_GPU, config) == "flash_attention_2"
    assert attention_for("auto", HALF_GPU, config) == "flash_attention_2"
    assert attention_for("auto", GPU, config) == "eager", "flash-attn computes in 16 bits only"
    assert attention_for("auto", HALF_GPU, tiny_config(GEMMA_2, head_dim=512)) == "eager"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert attention_for("auto", HALF_GPU, config) == "eager"


def test_a_class_of_the_models_own_code_is_left_to_transformers() -> None:
    class Own(type(tiny_config("Llama"))):  # type: ignore[misc]
        model_type = "unheard-of"

    assert attention_for("auto", GPU, Own()) is None


def test_the_loader_asks_the_models_config(tiny_model: Path, tmp_path: Path) -> None:
    tiny_model_of(tiny_config(GEMMA_2), "eager").save_pretrained(tmp_path / "gemma")
    with raises("model.attention"):
        load_base(named(tmp_path / "gemma", attn_implementation="sdpa"), WHOLE, CPU)
    model: Any = load_base(named(tmp_path / "gemma"), WHOLE, CPU)
    assert model.config._attn_implementation == "eager"
    change(tmp_path / "gemma" / "config.json", attn_logit_softcapping=None)
    model = load_base(named(tmp_path / "gemma", attn_implementation="sdpa"), WHOLE, CPU)
    assert model.config._attn_implementation == "sdpa"
