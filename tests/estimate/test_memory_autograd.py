"""The memory estimate's byte counts against what autograd really saves, and allocates at its peak, on this machine's CPU."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest

from finetune.estimate.memory_hf import Workload, estimate, saved_per_layer
from finetune.models.architectures import SHAPES, ModelShape

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

MISTRAL = SHAPES["mistralai/Mistral-7B-v0.1"]
TINY = ModelShape("tiny", 64, 2, 8, 2, 16, 160, 128)
"""heads x head_dim differs from hidden, so that mixing up the two fails a test."""
SLIM = ModelShape("slim", 128, 4, 8, 2, 16, 448, 128)
NARROW = replace(SLIM, intermediate=344)
"""MLPs as wide, for their hidden size, as Mistral's and Llama-2's."""
PLAIN = Workload(2, 48, adapter_bytes=2, lora_dropout=0, padded=False, four_bit=False)


def model_of(shape: ModelShape, load: Workload) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    dtype = getattr(torch, load.dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lora = peft.LoraConfig(r=load.lora_r, lora_dropout=load.lora_dropout, target_modules=list(load.lora_modules))
    model = peft.get_peft_model(model, lora).to(dtype).train()
    model.enable_input_require_grads()
    return model


def run(model: Any, load: Workload) -> Any:
    """The last hidden states, (rows, tokens, hidden), of rows of which the first has padding where the workload is padded."""
    mask = torch.ones(load.micro_batch_size, load.tokens, dtype=torch.long)
    mask[0, -3:] = 0 if load.padded else 1
    ids = torch.ones_like(mask)
    return model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def saved_by_autograd(shape: ModelShape, load: Workload) -> int:
    """Bytes of all tensors, weights apart, that a forward pass saves for its backward pass."""
    model = model_of(shape, load)
    weights = storages([*model.parameters(), *model.buffers()])
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(model, load)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.1},
        {"lora_modules": ("q_proj", "v_proj"), "lora_r": 4},
        {"lora_modules": ("o_proj", "up_proj", "down_proj")},
        {"dtype": "float32", "adapter_bytes": 4},
    ],
    ids=str,
)
def test_a_layer_keeps_what_autograd_keeps(changes: dict[str, Any], padded: bool) -> None:
    load = replace(PLAIN, padded=padded, **changes)
    item = 4 if load.dtype == "float32" else 2
    one_layer = saved_by_autograd(replace(TINY, layers=3), load) - saved_by_autograd(TINY, load)
    assert saved_per_layer(TINY, load, mask_bytes=item) == one_layer  # a CPU's dropout mask is of the compute dtype


def test_autocast_copies_of_the_adapters_are_kept_only_where_the_types_differ() -> None:
    copies = saved_per_layer(MISTRAL, replace(PLAIN, adapter_bytes=4)) - saved_per_layer(MISTRAL, PLAIN)
    assert copies == 2 * MISTRAL.lora_parameters(16) / MISTRAL.layers


def peak_of_a_step(shape: ModelShape, load: Workload) -> int:
    """Most bytes alive at a time, weights and their gradients apart, in a forward and backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = model_of(shape, load)
    if load.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.grad = torch.zeros_like(parameter)
    ignored = storages([*model.parameters(), *model.buffers(), *(parameter.grad for parameter in adapters)])
    alive: dict[int, int] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and not storages([tensor]) & (ignored | alive.keys()):
                    storage = tensor.untyped_storage()
                    alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage._cdata)
            peak = max(peak, sum(alive.values()))
            return result

    with Watch():
        run(model, load)[:, -1].float().sum().backward()
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dropout", [0.1, 0])
@pytest.mark.parametrize("modules", [PLAIN.lora_modules, ("q_proj", "v_proj"), ("gate_proj", "down_proj")], ids=len)
@pytest.mark.parametrize("shape", [SLIM, NARROW], ids=lambda shape: shape.intermediate)
def test_the_peak_of_a_step_is_the_one_that_really_comes(
    shape: ModelShape,
    modules: tuple[str, ...],
    dropout: float,
    padded: bool,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head apart, which is another one on a CPU. Dropout is made to keep one byte an element, as on a GPU."""
    monkeypatch.setattr(
        "torch.nn.functional.dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0]
    )
    monkeypatch.setattr("finetune.estimate.memory_hf.LABELLED", 0)
    load = replace(
        PLAIN,
        tokens=96,
        lora_r=4,
        lora_modules=modules,
        lora_dropout=dropout,
        padded=padded,
        checkpointing=checkpointing,
    )
    needed = estimate(shape, load)
    masks = load.micro_batch_size * load.tokens**2 if padded else 0
    assert needed.activations + masks == pytest.approx(peak_of_a_step(shape, load), rel=0.005)
