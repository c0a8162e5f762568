"""vLLM answers in a process of its own: the worker is the real one, vLLM a stand-in (tests/helpers/fake_vllm)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.errors import TransientError
from finetune.evaluation.generators.base import Answer, Sampling
from finetune.evaluation.generators.hf import HfGenerator
from finetune.evaluation.generators.vllm import VllmGenerator, VllmModel
from finetune.evaluation.run import evaluate_base
from finetune.models.load import load_tokenizer
from finetune.tokens import encode_prompts
from tests.helpers.data_examples import read_jsonl
from tests.helpers.errors import raises
from tests.helpers.fake_vllm.install import fake_vllm
from tests.helpers.run_examples import copy_run

ConfigWriter = Callable[..., Path]
PROMPTS = ["How many items?", "Which item has number 3?", "List the names of all items dearer than 12. " * 4, "a"]


class Fake:
    """The stand-in, which can be told to fail, and what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_vllm(folder / "site", monkeypatch)
        self.cache = folder / "site" / "cache"
        self._seen, self._patch = folder / "seen.jsonl", monkeypatch
        self.told()

    def told(self, **faults: Any) -> None:
        self._patch.setenv("FAKE_VLLM", json.dumps({"seen": str(self._seen), **faults}))

    def seen(self, key: str) -> list[Any]:
        return [line[key] for line in (read_jsonl(self._seen) if self._seen.is_file() else []) if key in line]

    @property
    def left(self) -> list[str]:
        """What is left in the cache."""
        return sorted(path.name for path in (self.cache / "vllm").glob("*"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def config(tiny_config: ConfigWriter) -> RunConfig:
    return load_config(tiny_config())


@pytest.fixture
def tokenizer(config: RunConfig) -> Any:
    return load_tokenizer(config.model)


def loaded(config: RunConfig) -> VllmModel:
    return VllmGenerator().load(config, None)


def ask(model: Any, prompts: list[str] = PROMPTS, *, tuned: bool = False, most: int = 8, **more: Any) -> list[Answer]:
    answers: list[Answer] = model.answers(
        prompts, tuned=tuned, batch_size=4, max_new_tokens=most, progress=False, **more
    )
    return answers


# the answers


def test_base_and_tuned_answers_are_those_of_hf(tiny_run: Path, tmp_path: Path, fake: Fake) -> None:
    run = copy_run(tiny_run, tmp_path / "runs", evaluation={"dequantize": True})
    config = run.config()
    theirs, ours = HfGenerator().load(config, run.adapter), VllmGenerator().load(config, run.adapter)
    for tuned in (False, True, False):
        assert ask(ours, tuned=tuned) == ask(theirs, tuned=tuned)
    assert ask(theirs, tuned=True) != ask(theirs)
    assert len(fake.seen("loaded")) == 1, "the engine was loaded more than once"
    assert len(fake.seen("reloaded")) == len(fake.seen("reset")) == 2
    assert ours.load_seconds > 0
    config.evaluation.adapter = "apart"
    apart = VllmGenerator().load(config, run.adapter)
    for tuned in (True, False):
        assert ask(apart, tuned=tuned) == ask(theirs, tuned=tuned)
    assert len(fake.seen("reloaded")) == 2, "an adapter apart needs no other weights"
    assert fake.seen("loaded")[1]["max_lora_rank"] == config.lora.r


def test_prompts_are_those_of_hf_to_the_id_and_neighbours_begin_alike(
    config: RunConfig, tokenizer: Any, fake: Fake
) -> None:
    fake.told(script=[[5]])
    ask(loaded(config))
    ids = encode_prompts(tokenizer, PROMPTS)
    assert fake.seen("prompt") == sorted(ids)


def test_an_answer_ends_where_it_ends_with_hf_and_vllm_is_told(config: RunConfig, tokenizer: Any, fake: Fake) -> None:
    whole, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("SELECT 1;", " and more"))
    fake.told(script=[[*whole, *rest], [7, tokenizer.eos_token_id, 9], [7]], pause=0.05)
    order = sorted(range(3), key=encode_prompts(tokenizer, PROMPTS[:3]).__getitem__)
    answers = ask(loaded(config), PROMPTS[:3], most=40)
    by_script = [answers[i] for i in order]
    assert [(answer.text, answer.new_tokens) for answer in by_script[:2]] == [
        ("SELECT 1;", len(whole)),
        (tokenizer.decode([7]), 1),
    ]
    assert by_script[2].new_tokens == 40
    assert fake.seen("aborted") == [[f"1-{order[0]}"]], "of the others vLLM itself knows the end"


def test_what_is_too_long_is_the_same_as_with_hf(config: RunConfig, fake: Fake) -> None:
    most, full = 16, "item " * 2000
    theirs = HfGenerator().load(config, None)
    prompts = ["How many items?", full, "dear " * 1015, full[: 5 * 900]]
    expected = ask(theirs, prompts, most=most)
    assert [answer.problem for answer in expected].count("too_long") >= 1
    assert ask(loaded(config), prompts, most=most) == expected
    assert ask(loaded(config), [full]) == [expected[1]]
    assert len(fake.seen("loaded")) == 1, "vLLM is not loaded where every prompt is too long"


def test_longer_prompts_than_before_load_vllm_again(config: RunConfig, fake: Fake) -> None:
    fake.told(script=[[5]])
    config.model.max_seq_length = 1024
    model = loaded(config)
    model._positions = 100_000
    ask(model, ["short"])
    ask(model, ["item " * 900])
    assert len(fake.seen("loaded")) == 1
    ask(model, ["item " * 3000])
    lengths = [arguments["max_model_len"] for arguments in fake.seen("loaded")]
    assert len(lengths) == 2
    assert lengths[0] < 3000 < lengths[1]


def test_a_sampled_answer_depends_on_its_prompt_and_seed_alone(config: RunConfig, fake: Fake) -> None:
    model = loaded(config)
    drawn = ask(model, sampling=Sampling(1.5, [1, 2, 3, 4]))
    again = ask(model, list(reversed(PROMPTS)), sampling=Sampling(1.5, [4, 3, 2, 1]))
    assert list(reversed(again)) == drawn
    assert ask(model, sampling=Sampling(1.5, [5, 6, 7, 8])) != drawn
    assert sorted(fake.seen("seed")[:4]) == [1, 2, 3, 4]
    assert ask(model) == ask(HfGenerator().load(config, None))


def test_answers_are_told_one_by_one_while_others_grow(config: RunConfig, tokenizer: Any, fake: Fake) -> None:
    fake.told(script=[[7, tokenizer.eos_token_id], [7]])
    told: list[int] = []
    answers = ask(loaded(config), most=12, done=lambda number, answer: told.append(answer.new_tokens))
    assert told == [1, 1, 12, 12]
    assert len(answers) == 4


# what goes wrong


def test_a_prompt_that_vllm_gives_up_on_fails_alone(config: RunConfig, fake: Fake, capsys: Any) -> None:
    fake.told(script=[[5]], error=["1-1"])
    answers = ask(loaded(config))
    assert [answer.problem for answer in answers] == [None, "failed", None, None]
    assert "gave no answer to a prompt of" in capsys.readouterr().err
    config.evaluation.max_new_tokens = 16
    verdicts = evaluate_base(config, generator="vllm", progress=False)["verdicts"]
    assert verdicts["failed"] == 1
    fake.told(script=[[5]])
    assert "failed" not in evaluate_base(config, generator="vllm", progress=False)["verdicts"], "it is asked again"


def test_killed_half_way_it_keeps_its_answers_and_goes_on(config: RunConfig, tokenizer: Any, fake: Fake) -> None:
    fake.told(script=[[7, tokenizer.eos_token_id], [7]], kill=4)
    with raises("evaluation.vllm_ended", match="SIGKILL.*its log: .*vllm-.*log", kind=TransientError):
        evaluate_base(config, generator="vllm", progress=False)
    assert [name for name in fake.left if not name.endswith(".log")] == []
    asked = len(fake.seen("prompt"))
    fake.told(script=[[7, tokenizer.eos_token_id]])
    assert evaluate_base(config, generator="vllm", progress=False)["questions"] == asked
    assert 0 < len(fake.seen("prompt")) - asked < asked


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        (
            {"load": "Free memory on device cuda:0 is less than desired GPU memory utilization"},
            "evaluation.vllm_memory",
        ),
        ({"script": [[5]], "raise": [2, "CUDA error: an illegal memory access"]}, "evaluation.vllm_failed"),
    ],
)
def test_a_fault_of_vllm_is_one_line_with_its_reason_and_log(
    config: RunConfig, fake: Fake, faults: dict[str, Any], code: str
) -> None:
    fake.told(**faults)
    reason = str(faults.get("load") or faults["raise"][1])[:40]
    with raises(code, match=f"{reason}.*evaluation.generator=hf.*its log|{reason}.*its log.*evaluation.generator=hf"):
        ask(loaded(config))
    [log] = fake.left
    assert reason in (fake.cache / "vllm" / log).read_text(encoding="utf-8")


def test_a_worker_that_says_nothing_is_ended(config: RunConfig, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.told(script=[[5]], hang=2)
    model = loaded(config)
    ask(model, most=1)
    process = model._process
    assert process is not None
    monkeypatch.setattr("finetune.evaluation.generators.vllm_process.SILENT_SECONDS", 0.3)
    with raises("evaluation.vllm_ended", match="said nothing", kind=TransientError):
        ask(model)
    assert gone(process.pid)


def test_ctrl_c_ends_the_worker_at_once_and_nothing_is_left(config: RunConfig, tokenizer: Any, fake: Fake) -> None:
    fake.told(script=[[7, tokenizer.eos_token_id], [7]], hang=3)
    model = loaded(config)
    pids: list[int] = []

    def interrupt(number: int, answer: Answer) -> None:
        assert model._process is not None
        pids.append(model._process.pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, done=interrupt)
    assert gone(pids[0])
    assert fake.left == []


def test_a_model_that_is_dropped_takes_its_process_and_folder_along(config: RunConfig, fake: Fake) -> None:
    fake.told(script=[[5]])
    model = loaded(config)
    ask(model)
    assert model._process is not None
    pid = model._process.pid
    assert not gone(pid, seconds=0)
    del model
    assert gone(pid)
    assert fake.left == []


def test_no_process_is_left_where_the_parent_is_killed(tiny_config: ConfigWriter, tmp_path: Path, fake: Fake) -> None:
    fake.told(script=[[5]], hang=2)
    path = tiny_config()
    program = f"""
from pathlib import Path
from finetune.config.load import load_config
from finetune.evaluation.generators.vllm import VllmGenerator
model = VllmGenerator().load(load_config(Path({str(path)!r})), None)
model.answers(["a"], tuned=False, batch_size=1, max_new_tokens=1, progress=False)
print(model._process.pid, flush=True)
model.answers(["a"], tuned=False, batch_size=1, max_new_tokens=4, progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid, seconds=0)
        parent.kill()
    assert gone(pid)
    assert fake.left, "a process that was killed leaves its folder"
    fake.told(script=[[5]])
    ask(model := loaded(load_config(path)))
    del model
    assert [name for name in fake.left if not name.endswith(".log")] == [], "the next one deletes it"


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or ends within some seconds."""
    until = time.monotonic() + seconds
    while True:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
