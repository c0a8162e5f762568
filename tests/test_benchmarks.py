"""benchmarks.throughput: the shared recipe, the peers' turns, the computed results, and peers that fail or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from benchmarks import throughput
from benchmarks.throughput_peer import Peer
from benchmarks.throughput_recipe import ANSWER_TOKENS, BATCH, IGNORED, make_texts
from benchmarks.throughput_report import plot, summarise, table
from tests.helpers.errors import raises

OBEDIENT = """
import json, sys
print("a library says hello")
print(json.dumps({"ready": {"how": "counts"}}), flush=True)
for line in sys.stdin:
    steps = [{"seconds": 2.0, "tokens": 100, "loss": 1.0}] * json.loads(line)["go"]
    print(json.dumps({"steps": steps, "trainer_counted": None}), flush=True)
"""
FAILS_LATER = OBEDIENT.replace("    print(json", "    raise SystemExit('no more memory')\n    print(json", 1)
HANGS = "import time\ntime.sleep(600)"


def peer(folder: Path, name: str, program: str) -> Peer:
    return Peer(name, [sys.executable, "-c", program], {}, folder)


def turn(number: int, *steps: tuple[float, int], left_out: int = 0) -> dict[str, Any]:
    """A turn of (seconds, tokens) steps."""
    rows = [
        {"seconds": seconds, "tokens": tokens, "loss": 2.0 - place} for place, (seconds, tokens) in enumerate(steps)
    ]
    return {"round": number, "left_out": left_out, "steps": rows, "trainer_counted": None}


def with_turns(name: str, *turns: dict[str, Any], error: str | None = None) -> Peer:
    return Peer(name, [], {}, Path(), error=error, turns=list(turns))


def test_texts_are_the_same_for_longer_sessions_and_have_the_lengths_of_text_to_sql() -> None:
    few, many = make_texts(40, 1000, 2048, seed=3), make_texts(4000, 1000, 2048, seed=3)
    assert many.ids[:40] == few.ids
    assert make_texts(40, 1000, 2048, seed=4).ids != few.ids
    lengths = sorted(many.lengths)
    assert 285 < sum(lengths) / 4000 < 312  # the anchors train 4,808 to 4,964 tokens a step of 16; 95th percentile 853
    assert 780 < lengths[3800] < 930
    longer = sorted(make_texts(4000, 1000, 2048, seed=3, median=372).lengths)
    assert 475 < sum(longer) / 4000 < 525 and 360 < longer[2000] < 385  # as Spider's in Mistral's tokens
    assert max(make_texts(400, 1000, 60, seed=3).lengths) == 60
    for ids, labels in zip(few.ids, few.labels, strict=True):
        assert labels[-ANSWER_TOKENS:] == ids[-ANSWER_TOKENS:]
        assert set(labels[:-ANSWER_TOKENS]) == {IGNORED}


def test_figures_are_medians_of_turns_and_ratios_of_the_same_round() -> None:
    base = with_turns("trl", turn(0, (9.0, 1), (1.0, 100), left_out=1), turn(1, (1.0, 50)), turn(2, (2.0, 180)))
    fast = with_turns("ours", turn(0, (1.0, 300)), turn(1, (2.0, 200), (2.0, 600)), turn(2, (1.0, 360)))
    rows = summarise([fast, base])["variants"]
    assert rows["trl"]["tokens_per_second"] == {"median": 90.0, "lowest": 50.0, "highest": 100.0}
    assert rows["ours"]["tokens_per_second"] == {"median": 300.0, "lowest": 200.0, "highest": 360.0}
    assert rows["ours"]["ratio"] == {"median": 4.0, "lowest": 3.0, "highest": 4.0}
    assert rows["ours"]["median_step_tokens_per_second"] == 300.0
    assert (rows["trl"]["measured_steps"], rows["trl"]["median_step_seconds"]) == (3, 1.0)


def test_without_trl_the_first_measured_variant_is_the_baseline() -> None:
    result = summarise(
        [with_turns("trl", error="no GPU"), with_turns("a", turn(0, (1.0, 10))), with_turns("b", turn(0, (1.0, 5)))]
    )
    assert result["baseline"] == "a"
    assert result["variants"]["b"]["ratio"]["median"] == 0.5
    assert "tokens_per_second" not in result["variants"]["trl"]


def test_a_trainer_that_counts_other_tokens_is_noted() -> None:
    right, wrong = turn(0, (1.0, 10)) | {"trainer_counted": [10]}, turn(0, (1.0, 10)) | {"trainer_counted": [12]}
    result = {"date": "2026-11-22", "warm_up_steps_left_out": {"first_turn": 2, "later_turns": 1}} | summarise(
        [with_turns("a", right), with_turns("b", wrong)]
    )
    assert result["variants"]["a"]["counts_agree"]
    assert not result["variants"]["b"]["counts_agree"]
    heading, meaning, meaning_too, _, first, second = table(result).splitlines()
    assert "median over rounds" in meaning and "median over all measured steps" in meaning_too
    assert "ratio to a; warm-up left out: 2 steps of the first turn, 1 of each later one" in heading
    assert "counted" not in first
    assert "counted other tokens" in second


def test_plot_needs_a_measured_variant(tmp_path: Path) -> None:
    head = {"date": "2026-11-22T10:00:00"}
    assert plot(head | summarise([with_turns("a", error="no GPU")]), tmp_path) == []
    paths = plot(head | summarise([with_turns("a", turn(0, (1.0, 10)), turn(1, (1.0, 30)))]), tmp_path)
    assert [path.name for path in paths] == ["throughput.png", "throughput.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text(encoding="utf-8")


def test_the_order_rotates() -> None:
    peers = [with_turns(name) for name in "abc"]
    assert ["".join(peer.name for peer in throughput.rotated(peers, number)) for number in range(4)] == [
        "abc", "bca", "cab", "abc",
    ]  # fmt: skip


def test_failing_and_hanging_peers_do_not_stop_the_others(tmp_path: Path) -> None:
    peers = [
        peer(tmp_path, "hangs", HANGS), peer(tmp_path, "good", OBEDIENT), peer(tmp_path, "fails", FAILS_LATER),
        peer(tmp_path, "speechless", "print('what?')"), Peer("absent", ["/no/such/python"], {}, tmp_path),
    ]  # fmt: skip
    begun = time.monotonic()
    result = throughput.measure(peers, rounds=2, steps=3, warm_up=4, timeout=5.0, out=tmp_path, head={"date": "today"})
    assert time.monotonic() - begun < 25
    rows = result["variants"]
    assert rows["good"]["tokens_per_second"]["median"] == 50.0
    assert [len(turn["steps"]) for turn in rows["good"]["turns"]] == [7, 4]  # 3 and the warm-up of each turn
    assert "no answer within 5 seconds, killed" in rows["hangs"]["error"]
    assert rows["fails"]["error"] == "no more memory"
    assert rows["speechless"]["error"] == "ended without any output"
    assert rows["absent"]["error"] == "/no/such/python: No such file or directory"
    assert json.loads((tmp_path / "throughput.json").read_text()) == result


def test_late_peers_start_when_the_others_have_loaded(tmp_path: Path) -> None:
    """Each worker writes the time of its start; the early one takes a second to load."""
    writes = "import time, sys\nprint(time.time(), file=sys.stderr, flush=True)\n"
    late, early = (
        peer(tmp_path, "late", writes + OBEDIENT),
        peer(tmp_path, "early", writes + "time.sleep(1)\n" + OBEDIENT),
    )
    late.late = True
    try:
        throughput.load([late, early], timeout=20.0)
        assert float(late.log.read_text()) > float(early.log.read_text()) + 1
    finally:
        late.end()
        early.end()


def test_memory_for_ours_does_not_override_a_variant_of_its_own() -> None:
    variants = throughput.chosen("trl,ours,ours_10gib", [], 40.0)
    assert [variant.settings.get("training.max_memory_gib") for variant in variants.values()] == [None, 40.0, 10.0]


def runs(process: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_hanging_worker_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys\nchild = subprocess.Popen(['sleep', '600'])\nprint(child.pid, file=sys.stderr, flush=True)\n"
    hanging = peer(tmp_path, "hangs", child + HANGS)
    hanging.start()
    hanging.load(timeout=3.0)
    child_process = int(hanging.log.read_text())
    deadline = time.monotonic() + 5  # the kernel needs a moment on a busy machine
    while (alive := runs(child_process)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--variants", "trl,hers"], "expected names of trl, trl_fp16"),
        (["--device", "cpu", "--ours", "mine={x}"], "expected NAME=JSON"),
        (["--device", "cpu"], "no config.json in it"),
        (["--device", "cpu", "--rounds", "0"], "expected at least 1"),
        (["--device", "cpu", "--warm-up", "-1"], "expected 0 or more"),
        pytest.param([], "no CUDA GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.throughput", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=throughput.ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.throughput: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_benchmark_for_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises("benchmark.no_gpu"):
        throughput.check(throughput.parse(["model"]))


def test_settings_of_ours_reach_the_config_and_wrong_ones_are_refused(tiny_model: Path) -> None:
    from benchmarks.throughput_ours import our_config

    recipe = throughput.make_recipe(throughput.parse([str(tiny_model), "--device", "cpu"]), steps=7)
    config = our_config(recipe, {"lora.lora_dropout": 0.25, "training.per_device_train_batch_size": 2})
    assert (config.lora.lora_dropout, config.training.per_device_train_batch_size) == (0.25, 2)
    assert (config.training.max_steps, config.training.effective_batch_size) == (7, BATCH)
    with raises("config.unknown_key", match="lora_droput"):
        our_config(recipe, {"lora.lora_droput": 0.25})


def test_only_ours_grows_its_segments_and_a_setting_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = throughput.parse(["model", "--unsloth-path", "/its/packages"])
    ours, trl, unsloth = (throughput.VARIANTS[name] for name in ("ours", "trl", "unsloth"))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    assert throughput.environment(ours, arguments)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in throughput.environment(trl, arguments)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in throughput.environment(unsloth, arguments)
    assert throughput.environment(ours, arguments)["PYTHONPATH"] == str(throughput.ROOT)
    assert throughput.environment(unsloth, arguments)["PYTHONPATH"].split(":") == [
        "/its/packages",
        str(throughput.ROOT),
    ]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert throughput.environment(ours, arguments)["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in throughput.environment(ours, arguments)


@pytest.mark.parametrize(("rows", "padded_shape"), [(16, "4 x 4"), (2, "2 x 8")])
def test_unsloth_prepares_the_texts_itself_and_pads_fewer_rows_where_it_must(
    rows: int, padded_shape: str, tiny_model: Path
) -> None:
    """With skip_prepare_dataset Unsloth 2026.10.9 disables padding-free; TRL's config must accept the remaining options."""
    from trl import SFTConfig

    from benchmarks.throughput_unsloth import how, padded, padding_free

    recipe = throughput.make_recipe(throughput.parse([str(tiny_model), "--device", "cpu"]), steps=7)
    recipe = recipe.with_settings({"rows": rows, "checkpointing": False})
    flat, rectangular = SFTConfig(**padding_free(recipe)), SFTConfig(**padded(recipe))
    assert (flat.padding_free, flat.dataset_kwargs, flat.max_length, flat.gradient_checkpointing) == (
        True, None, None, False,
    )  # fmt: skip
    assert how(SimpleNamespace(args=flat)) == f"padding-free, {rows} x {BATCH // rows}"
    assert how(SimpleNamespace(args=rectangular)) == f"padded (Unsloth refused padding-free), {padded_shape}"


@pytest.mark.repeat
def test_trl_and_ours_train_the_same_texts_to_the_same_losses(tiny_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.throughput", str(tiny_model), "--device", "cpu", "--longest", "50",
        "--variants", "trl_d0,ours_d0", "--ours", 'odd={"training.nonsense": 1}', "--rounds", "2", "--steps", "1",
        "--warm-up", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=throughput.ROOT, check=False)
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "throughput.json").read_text())["variants"]
    steps = {name: [step for turn in rows[name]["turns"] for step in turn["steps"]] for name in ("trl_d0", "ours_d0")}
    assert [step["tokens"] for step in steps["trl_d0"]] == [step["tokens"] for step in steps["ours_d0"]]
    assert len(steps["trl_d0"]) == 5
    losses = [[step["loss"] for step in steps[name]] for name in ("trl_d0", "ours_d0")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert all(rows[name]["counts_agree"] and rows[name]["turns"][0]["trainer_counted"] for name in steps)
    assert rows["ours_d0"]["ratio"]["median"] > 0
    assert "unknown key training.nonsense" in rows["odd"]["error"]
    assert (tmp_path / "throughput.png").stat().st_size > 5000
    assert "odd            failed: UserError" in done.stdout


def shim() -> Any:
    from benchmarks.throughput_unsloth import SHIM

    sys.path.append(str(SHIM))
    try:
        import flash_attn
    finally:
        sys.path.remove(str(SHIM))
    return flash_attn


def test_the_shim_hands_torch_what_its_kernel_takes() -> None:
    """On the meta device torch checks arguments and shapes of the kernel and of its gradient, without a GPU."""
    flash = shim()
    q = torch.empty(20, 8, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(20, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    for window in ((-1, -1), (15, 15)):
        out = flash.flash_attn_varlen_func(
            q, k, v, bounds, bounds, 15, 15, dropout_p=0.0, causal=True, softmax_scale=None, window_size=window
        )
        assert out.shape == q.shape
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
    assert flash.flash_attn_func(q[None], k[None], v[None], causal=True).shape == (1, *q.shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_the_shim_attends_within_each_sequence() -> None:
    flash = shim()
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(90, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    )
    bounds = torch.tensor([0, 30, 90], device="cuda", dtype=torch.int32)
    out = flash.flash_attn_varlen_func(q, k, v, bounds, bounds, 60, 60, causal=True, window_size=(-1, -1))
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    parts = [
        attend(*(x[begin:end].transpose(0, 1)[None].float() for x in (q, k, v)), is_causal=True, enable_gqa=True)
        for begin, end in ((0, 30), (30, 90))
    ]
    expected = torch.cat([part[0].transpose(0, 1) for part in parts])
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, atol=5e-2, rtol=5e-2)
