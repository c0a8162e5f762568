"""The decoding loop gives the tokens that transformers' `generate` gives to each prompt alone, whatever stands beside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from finetune.evaluation.generators import decoding, passes, row_cache
from finetune.evaluation.generators import packed_head as packed_head_module
from finetune.evaluation.generators.asked import Asked
from finetune.evaluation.generators.base import Problem
from finetune.evaluation.generators.decoding import Decoder
from finetune.evaluation.generators.packed_head import packed_head
from finetune.evaluation.generators.rows_attention import rows_attention

VOCABULARY = 97
END = 5
ENDS = [END, *range(9, VOCABULARY, 12)]
"""Many tokens end an answer, so that random models end some."""
SCHEMAS = [[11 + (7 * n + k * k) % 80 for n in range(20 + 9 * k)] for k in range(3)]
PROMPTS = [
    *([*SCHEMAS[number % 3], *range(20, 20 + number)] for number in range(1, 9)),
    [30],
    [30, 31, 32],
    [*SCHEMAS[1], 40, 41],
    [*SCHEMAS[1], 40, 41],
    SCHEMAS[2],
    list(range(10, 90)),
]


def tiny(kind: str, **changes: Any) -> Any:
    """A random model in float32 whose answers depend on their prompts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
        "eos_token_id": ENDS,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes))
    return model.eval()


class Tokenizer:
    """As much of one as the loop needs: its texts never end by themselves."""

    eos_token_id, pad_token_id = END, 0

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in ids)


def expected(model: Any, prompt: list[int], room: int) -> list[int]:
    """What `generate` answers to this prompt alone, without the token that ends it."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": room, "eos_token_id": ENDS, "pad_token_id": 0}
    output: list[int] = model.generate(torch.tensor([prompt], device=model.device), **settings)[
        0, len(prompt) :
    ].tolist()
    return output[: next((place for place, token in enumerate(output) if token in ENDS), len(output))]


def answers(
    model: Any, prompts: Sequence[list[int]], rooms: Sequence[int], batch_size: int, **settings: Any
) -> dict[int, tuple[list[int], Problem | None]]:
    found: dict[int, tuple[list[int], Problem | None]] = {}

    def finished(one: Asked, ids: list[int], problem: Problem | None) -> None:
        assert one.number not in found
        found[one.number] = (ids, problem)

    seeds = settings.pop("seeds", range(len(prompts)))
    asked = [
        Asked(n, p, room, "sqlite", seed) for n, (p, room, seed) in enumerate(zip(prompts, rooms, seeds, strict=True))
    ]
    temperature = settings.pop("temperature", None)
    Decoder(model, Tokenizer(), batch_size, temperature, finished).answer(asked)  # type: ignore[arg-type]
    assert sorted(found) == list(range(len(prompts)))
    return found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as the batch size says, also on a CPU, so that rows are refilled."""
    monkeypatch.setattr(decoding, "CPU_ROWS", 1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


KINDS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 6, "attn_implementation": "sdpa"}),  # SmolLM2's and CodeLlama's
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4096}),
    ("qwen2", {}),
    ("gemma2", {"sliding_window": 4096, "query_pre_attn_scalar": 8}),
    ("gpt2", {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256}),
    ("phi3", {}),
    ("olmo2", {}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_greedy_answers_are_those_of_generate(kind: str, changes: dict[str, Any]) -> None:
    """With prompts of mixed lengths, equal ones, shared beginnings and answers that end at different places."""
    model = tiny(kind, **changes)
    rooms = [12, 25, 1, 12, 3, 12, 12, 2, 12, 30, 12, 1, 7, 12]
    assert passes.longest_text(model) >= 200
    alone = [expected(model, prompt, room) for prompt, room in zip(PROMPTS, rooms, strict=True)]
    assert len({tuple(ids) for ids in alone}) > 9, "answers that do not depend on the prompt prove nothing"
    assert any(len(ids) < room for ids, room in zip(alone, rooms, strict=True)), "none ends by itself"
    for batch_size in (1, 3, 4, 100):
        found = answers(model, PROMPTS, rooms, batch_size)
        assert [found[number][0] for number in range(len(PROMPTS))] == alone, batch_size


def test_one_prompt_alone(llama: Any) -> None:
    assert answers(llama, [PROMPTS[3]], [9], 16)[0][0] == expected(llama, PROMPTS[3], 9)
    assert answers(llama, [[7]], [1], 16)[0][0] == expected(llama, [7], 1)
    assert answers(llama, [], [], 16) == {}


def test_a_shared_beginning_is_computed_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = [0]
    forward = passes.Passes.forward

    def counting(self: Any, cache: Any, ids: torch.Tensor, *given: Any) -> Any:
        computed[0] += ids.numel() if ids.shape[1] > 1 else 0
        return forward(self, cache, ids, *given)

    monkeypatch.setattr(passes.Passes, "forward", counting)
    prompts = [[*SCHEMAS[2], 40 + n, 50] for n in range(8)]
    answers(llama, prompts, [4] * 8, 3)
    assert computed[0] == len(SCHEMAS[2]) + 8 * 2


def test_a_row_that_ended_gets_the_next_prompt(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static batch would take as many steps as the slowest of each batch."""
    steps = [0]
    step = Decoder._step

    def counting(self: Any, rows: int, columns: int) -> None:
        steps[0] += 1
        step(self, rows, columns)

    monkeypatch.setattr(Decoder, "_step", counting)
    monkeypatch.setattr("finetune.evaluation.generators.stopping.GrowingAnswer.add", never_ends)
    rooms = [41, *[5] * 9, 1]
    answers(llama, [[10 + n, 20] for n in range(11)], rooms, 2)
    assert steps[0] == 40, "nine answers of five tokens fit beside one of 41"


def never_ends(self: Any, token: int) -> bool:
    self.ids.append(token)
    return False


def test_models_that_keep_less_than_every_token_are_not_served() -> None:
    window = tiny("mistral", sliding_window=32)
    assert passes.longest_text(window) == 32
    assert passes.longest_text(tiny("gemma2", sliding_window=16, query_pre_attn_scalar=8)) == 16
    mamba = tiny("mamba", state_size=4)
    assert passes.longest_text(mamba) == 0
    assert passes.longest_text(object()) == 0


def test_a_model_that_takes_no_positions_of_ours_is_not_served(capsys: pytest.CaptureFixture[str]) -> None:
    """Bloom's attention is biased by distances that it reads from a mask of two dimensions."""
    bloom = tiny("bloom", n_head=6, n_layer=2)
    assert passes.longest_text(bloom) == 0
    assert passes.longest_text(bloom) == 0
    assert capsys.readouterr().err.count("static batches") == 1


# sampling


def test_a_sampled_answer_depends_on_its_prompt_and_seed_alone(llama: Any) -> None:
    rooms, seeds = [10] * len(PROMPTS), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 7, 7, 8, 2**62]
    found = {size: answers(llama, PROMPTS, rooms, size, temperature=1.3, seeds=seeds) for size in (1, 3, 100)}
    assert found[1] == found[3] == found[100]
    assert found[1][10] == found[1][11], "the same prompt and seed"
    other = answers(llama, PROMPTS, rooms, 3, temperature=1.3, seeds=[seed + 1 for seed in seeds])
    assert sum(found[1][n] == other[n] for n in range(len(PROMPTS))) <= 2
    cold = answers(llama, PROMPTS, rooms, 3, temperature=1e-4, seeds=seeds)
    assert [cold[n][0] for n in range(len(PROMPTS))] == [expected(llama, prompt, 10) for prompt in PROMPTS]


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    from finetune.evaluation.generators.sampling import chosen

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    count = 40_000
    seeds = torch.arange(count) // 8 * 1_000_003
    drawn = chosen(logits.expand(count, -1), 0.7, seeds, torch.arange(count) % 8)
    found = torch.bincount(drawn, minlength=5) / count
    assert torch.allclose(found, torch.softmax(logits / 0.7, 0), atol=0.01)


# memory


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_with_too_little_memory_fewer_are_answered_at_once(
    llama: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """It runs out while answers are in progress, and the longest prompt does not fit alone."""
    forward = passes.Passes.forward
    most: list[int] = []

    def limited(self: Any, cache: Any, ids: torch.Tensor, positions: Any, places: Any, columns: int) -> Any:
        if len(ids) * columns > 150 or columns > 85:
            raise error
        most.append(len(ids))
        return forward(self, cache, ids, positions, places, columns)

    monkeypatch.setattr(passes.Passes, "forward", limited)
    rooms = [12] * len(PROMPTS)
    found = answers(llama, PROMPTS, rooms, 8)
    monkeypatch.undo()
    longest = max(range(len(PROMPTS)), key=lambda number: len(PROMPTS[number]))
    for number, prompt in enumerate(PROMPTS):
        if number == longest:
            assert found[number] == ([], "out_of_memory")
        else:
            assert found[number] == (expected(llama, prompt, 12), None)
    said = capsys.readouterr().err
    assert "at once: going on with 4" in said and "80 tokens alone" in said
    assert max(most) > 1, "shorter prompts are answered several at once again"


def test_another_error_is_not_taken_for_missing_memory(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(passes.Passes, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        answers(llama, PROMPTS, [4] * len(PROMPTS), 4)


def test_the_model_keeps_its_attention(llama: Any) -> None:
    before = llama.config._attn_implementation

    def stop(*_: Any) -> None:
        raise KeyError("stopped")

    answers(llama, PROMPTS[:2], [3, 3], 2)
    with pytest.raises(KeyError):
        Decoder(llama, Tokenizer(), 2, None, stop).answer([Asked(0, [9], 2, "sqlite")])  # type: ignore[arg-type]
    assert llama.config._attn_implementation == before


def test_the_cache_shrinks_with_the_prompts_left(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its rows are as many again, where memory allowed less for longer ones."""
    made: list[tuple[int, int]] = []
    original = row_cache.RowCache.__init__

    def noting(self: Any, layers: int, rows: int, columns: int) -> None:
        made.append((rows, columns))
        original(self, layers, rows, columns)

    monkeypatch.setattr(row_cache.RowCache, "__init__", noting)
    prompts = [[10 + n % 70 for n in range(length)] for length in (120, 118, *range(30, 18, -1))]
    found = answers(llama, prompts, [6] * len(prompts), 2)
    assert [found[n][0] for n in range(len(prompts))] == [expected(llama, prompt, 6) for prompt in prompts]
    own = [columns for rows, columns in made if rows == 2]
    assert 128 in own and min(own) <= 64


def test_a_cpu_answers_more_at_once_where_the_cache_is_small(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    step = Decoder._step

    def noting(self: Any, n: int, columns: int) -> None:
        rows.append(n)
        step(self, n, columns)

    monkeypatch.setattr(Decoder, "_step", noting)
    monkeypatch.setattr(decoding, "CPU_ROWS", 10)
    prompts = [[10 + n, 20] for n in range(12)]
    for most_bytes, expected_rows in ((2**30, 10), (1, 3)):
        rows.clear()
        monkeypatch.setattr(decoding, "CPU_CACHE_BYTES", most_bytes)
        answers(llama, prompts, [4] * 12, 3)
        assert max(rows) == expected_rows


def with_head(bias: bool) -> tuple[Any, torch.nn.Linear]:
    model, head = torch.nn.Module(), torch.nn.Linear(48, 1001, bias=bias).requires_grad_(False)
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    return model, head


@pytest.mark.parametrize("bias", [False, True])
def test_the_packed_head_computes_the_same(bias: bool) -> None:
    model, head = with_head(bias)
    for shape in ((3, 1, 48), (1, 48), (70, 1, 48)):
        x = torch.randn(shape)
        with torch.inference_mode(), packed_head(model):
            assert "forward" in vars(head)
            found = head(x)
        assert "forward" not in vars(head)
        assert torch.allclose(found, head(x), atol=1e-5) and found.shape == head(x).shape


@pytest.mark.parametrize("most_bytes", [0, packed_head_module.MOST_BYTES], ids=["plain", "packed"])
def test_the_head_is_not_copied_for_each_prompt(most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of rows with gaps between them is, in torch, one product for each row, on a copy of the weights."""
    monkeypatch.setattr(packed_head_module, "MOST_BYTES", most_bytes)
    model, head = with_head(False)
    last = torch.randn(3, 7, 48)[:, -1:]
    with torch.inference_mode(), packed_head(model), profile(activities=[ProfilerActivity.CPU]) as seen:
        head(last)
    assert "aten::bmm" not in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (4, 1)])
def test_attention_on_a_cpu_is_that_of_torch(heads: int, key_heads: int) -> None:
    rows, columns, width, used = 5, 24, 16, 21
    query, (key, value) = torch.randn(rows, heads, 1, width), torch.randn(2, rows, key_heads, columns, width)
    key, value = key[:, :, :used], value[:, :, :used]  # a part of the cache, as in a step
    mask = (torch.arange(used) <= torch.tensor([3, 20, 0, 7, 11])[:, None])[:, None, None]
    for scale in (None, 0.3):
        found, _ = rows_attention(torch.nn.Module(), query, key, value, mask, scaling=scale)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        assert torch.allclose(found, wanted.transpose(1, 2), atol=1e-6)


def test_prompts_in_any_order_have_the_same_answers(llama: Any) -> None:
    few = PROMPTS[:4]
    alone = {tuple(prompt): expected(llama, prompt, 5) for prompt in few}
    for order in itertools.permutations(few):
        found = answers(llama, order, [5] * 4, 2)
        assert [found[n][0] for n in range(4)] == [alone[tuple(prompt)] for prompt in order]
