"""The fused estimate's byte counts against a run of finetune/models/fused/layer.py on this machine's CPU that counts every
tensor.

Kernels that a CPU does not have are replaced by functions that allocate what the kernel's source allocates and compute nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.estimate.memory_fused import FLASH_BLOCK, FusedLoad, fused_estimate
from finetune.estimate.memory_hf import CUBLAS_BYTES, Workload
from finetune.models.architectures import ModelShape

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from finetune.example import IGNORED, targets_of  # noqa: E402
from finetune.models.fused import attention, ops_torch  # noqa: E402
from finetune.models.fused.model import FusedModel, pack  # noqa: E402
from finetune.training.step.optimizer import FlatAdapters  # noqa: E402

SLIM = ModelShape("slim", 128, 4, 8, 2, 16, 448, 96)
WIDE_HEAD = replace(SLIM, vocab=4000)
BROAD = ModelShape("broad", 128, 4, 8, 8, 24, 192, 96)
"""Heads as many as keys, wider than hidden, a narrow MLP: attention decides."""
GROUPED = ModelShape("grouped", 64, 4, 8, 4, 32, 128, 96)
"""The same, with two heads to a key."""
LENGTHS = (700, 300, 200, 150, 50)
LOAD = Workload(1, max(LENGTHS), lora_r=2, four_bit=False)


def triton_like() -> SimpleNamespace:
    """What finetune/models/fused/ops_triton.py allocates, but for sums in parts, which are small."""
    return SimpleNamespace(
        lora_down=lambda x, a, r, p, seed: x.new_empty(x.shape[0], a.shape[0]),
        lora_input_grad_=lambda *_: None,
        lora_a_grad=lambda g, x, r, p, seed: torch.zeros(g.shape[1], x.shape[1]),
        rope_=lambda *_, **__: None,
        rms_norm=lambda x, weight, eps: torch.empty_like(x),
        rms_norm_backward=lambda dy, x, weight, eps, residual: torch.empty_like(x),
        swiglu=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
        swiglu_backward_=lambda *_: None,
    )


def kernel_forward(q: Any, k: Any, v: Any, segments: Any, backend: str) -> Any:
    tokens, heads, _ = q.shape
    if backend == "flash":
        return attention.Attended(q.new_zeros(q.shape), (torch.zeros(heads, tokens),))
    copies = [attention._repeated(x, heads) for x in (k, v)]
    sums = torch.zeros(heads, len(segments.lengths) * segments.longest)
    del copies
    return attention.Attended(q.new_zeros(q.shape), (sums,))


def kernel_backward(d_out: Any, q: Any, k: Any, v: Any, attended: Any, segments: Any, backend: str) -> Any:
    tokens, heads, width = q.shape
    texts = len(segments.lengths)
    if backend == "flash":
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        wide = [] if k.shape[1] == heads else [q.new_zeros(q.shape) for _ in "kv"]
        sums = torch.zeros(tokens + FLASH_BLOCK * texts, heads, width + 1)  # of q's gradient, and one number a head
        del wide, sums
        return dq, dk, dv
    copies = [attention._repeated(x, heads) for x in (k, v)]
    gradients = [q.new_zeros(q.shape) for _ in "qkv"]
    sums = torch.zeros(texts * segments.longest, heads, width + 1)
    del sums, copies
    return gradients[0], *(attention._summed(x, k.shape[1]) for x in gradients[1:])


def logsumexp(x: Any, dim: int, keepdim: bool) -> Any:
    """In the steps that torch takes inside, where the meter cannot look (ReduceOps.cpp)."""
    largest = x.amax(dim, keepdim=keepdim)
    return (x - largest).exp_().sum(dim, keepdim=keepdim).log_() + largest


def model_of(shape: ModelShape, load: Workload) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=load.lora_r, lora_dropout=load.lora_dropout, target_modules=list(load.lora_modules))
    return peft.get_peft_model(model, lora).train()


def measured(shape: ModelShape, fused: FusedLoad, labelled: int) -> int:
    """Most bytes alive at a time in a forward and backward pass, beside weights, adapters, their copies and gradients."""
    model = model_of(shape, fused.load)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    flat = FlatAdapters(adapters)
    flat.begin()
    ops = triton_like() if fused.on_ampere else ops_torch
    path = FusedModel(model, torch.bfloat16, ops=ops, backend="flash" if fused.on_ampere else "efficient")  # type: ignore[arg-type]
    path.dropout = fused.load.lora_dropout
    weights = [group.weight() for layer in path.layers for group in layer.groups]
    copies = [
        tensor for layer in path.layers for group in layer.groups for tensor in (group.a, group.b) if tensor is not None
    ]
    resident = {
        tensor.untyped_storage()._cdata
        for tensor in (*model.parameters(), *model.buffers(), *weights, *copies, flat.parameter, flat.gradient)
    }
    alive: dict[int, int] = {}
    peak = 0

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in resident and storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage._cdata)
            peak = max(peak, sum(alive.values()))
            return result

    ids = [[1] * length for length in LENGTHS]
    targets = [targets_of([IGNORED] * (length - labelled) + [1] * labelled) for length in LENGTHS]
    with Meter():
        packed = pack(ids, targets, path.device)
        path.loss(packed, uncheckpointed_layers=fused.uncheckpointed_layers).backward()
    return peak


@pytest.mark.parametrize("uncheckpointed", [0, 1, 4])
@pytest.mark.parametrize(("ampere", "dropout"), [(True, 0.05), (False, 0.05), (False, 0.0)])
@pytest.mark.parametrize("modules", [LOAD.lora_modules, ("q_proj", "v_proj")], ids=len)
@pytest.mark.parametrize(
    ("shape", "labelled"), [(SLIM, 20), (SLIM, 45), (WIDE_HEAD, 45), (BROAD, 20), (GROUPED, 20)], ids=str
)
def test_the_peak_is_what_is_really_allocated(
    shape: ModelShape, labelled: int, modules: tuple[str, ...], dropout: float, ampere: bool, uncheckpointed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("finetune.models.fused.attention.forward", kernel_forward)
    monkeypatch.setattr("finetune.models.fused.attention.backward", kernel_backward)
    monkeypatch.setattr("torch.Tensor.logsumexp", logsumexp)
    monkeypatch.setattr(
        "finetune.models.fused.ops_torch._product_in_float32",
        lambda left, right: torch.zeros(left.shape[0], right.shape[1]),
    )
    load = replace(LOAD, lora_modules=modules, lora_dropout=dropout)
    fused = FusedLoad(
        load,
        sum(LENGTHS),
        uncheckpointed,
        ampere=ampere,
        texts=len(LENGTHS),
        labelled=labelled * len(LENGTHS) / sum(LENGTHS),
    )
    needed = fused_estimate(shape, fused)
    found = measured(shape, fused, labelled)
    assert needed.activations + needed.logits + needed.workspace - CUBLAS_BYTES == pytest.approx(found, rel=0.01)
