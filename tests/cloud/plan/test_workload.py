"""The size of a run: as many steps as the trainer takes; tokens are counted, or labelled as assumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.plan.workload import RunSize, evaluation_size, run_size
from finetune.config.load import load_config
from tests.helpers.data_examples import described, jsonl_source, row, run_prepare, write_jsonl
from tests.helpers.errors import raises
from tests.helpers.plan_examples import run_config, write_manifest
from tests.helpers.train_helpers import record_of


def size(**sections: dict[str, Any]) -> RunSize:
    return run_size(run_config(**sections))


def training(**values: Any) -> dict[str, Any]:
    """Batches of 16 examples."""
    return {"eval_steps": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4} | values


def refused(code: str, **sections: dict[str, Any]) -> str:
    with raises(code) as caught:
        size(**sections)
    return str(caught.value)


# steps and tokens


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "epochs_done"),
    [
        (1, -1, 63, 1.0),  # 62 batches of 16 and one of 8
        (3, -1, 189, 3.0),
        (0.5, -1, 32, 32 / 63),  # 31.5: the trainer finishes the last step
        (0.001, -1, 1, 1 / 63),
        (3, 10, 10, 10 / 63),
        (1, 126, 126, 2.0),  # max_steps overrides the epochs
    ],
)
def test_steps_and_tokens_follow_from_epochs_and_max_steps(
    epochs: float, max_steps: int, steps: int, epochs_done: float
) -> None:
    plan = {"records": 1000, "mean_tokens": 120.0}
    found = size(plan=plan, training=training(num_train_epochs=epochs, max_steps=max_steps))
    assert found.steps == steps
    assert found.tokens == pytest.approx(1000 * 120 * epochs_done)


@pytest.mark.parametrize(("eval_steps", "passes"), [(0, 0), (1000, 1), (100, 1), (50, 2), (40, 3), (30, 4)])
def test_validation_counts_one_pass_every_eval_steps_and_one_at_the_end(
    eval_steps: int, passes: int, tmp_path: Path
) -> None:
    write_manifest(tmp_path)
    found = size(data={"output_dir": str(tmp_path)}, training=training(max_steps=100, eval_steps=eval_steps))
    assert found.validation_tokens == pytest.approx(passes * 50 * 120)


@pytest.mark.parametrize(("keys", "steps"), [
    ({"per_device_train_batch_size": "auto", "gradient_accumulation_steps": None}, 63),
    ({"per_device_train_batch_size": "auto", "gradient_accumulation_steps": None, "effective_batch_size": 100}, 10),
    ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": None, "effective_batch_size": 100}, 10),
    ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 10}, 20),
    ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": None}, 200),
])  # fmt: skip
def test_a_step_is_an_effective_batch_however_it_is_split(keys: dict[str, Any], steps: int) -> None:
    assert size(plan={"records": 1000}, training=training(num_train_epochs=1, **keys)).steps == steps


def test_the_trainer_itself_plans_the_same_steps_and_validation_passes(
    tiny_config: Callable[..., Path], tmp_path: Path, no_keys: None
) -> None:
    pytest.importorskip("torch")
    from finetune.cli.main import main

    config = tiny_config(training={"max_steps": -1, "num_train_epochs": 0.4, "eval_steps": 2})  # 2.4 steps
    assert main(["train", str(config)]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    found = run_size(load_config(config))
    assert found.steps == record["steps"]["planned"] == 3
    evaluated = [line["step"] for line in record["history"] if "eval_loss" in line]
    assert evaluated == [2, 3]  # one pass at the end, though 3 is no multiple of eval_steps
    assert found.validation_tokens == pytest.approx(len(evaluated) * 6 * found.mean_tokens)


# counted


def test_the_counts_of_a_prepared_folder_are_used(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    found = size(data={"output_dir": str(tmp_path)}, training=training(), plan={"records": 7, "mean_tokens": 999.0})
    assert (found.records, found.mean_tokens, found.tokens) == (1000, 120.0, 120_000)
    assert found.basis == f"counted in {manifest}"


def test_a_folder_that_data_prepare_wrote_is_read(tiny_data: Path, tmp_path: Path) -> None:
    found = size(data=described(tiny_data), plan={"mean_tokens": 50.0})  # prepared without a tokenizer
    assert (found.records, found.mean_tokens) == (24, 50.0)
    assert found.basis == f"24 examples of {tiny_data}/manifest.json, 50 tokens each (plan.mean_tokens; not counted)"

    class Words:
        """A tokenizer whose tokens are words."""

        eos_token_id, chat_template = 0, None

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    rows = [row(n, question=f"Which item has number {n}?", split="train" if n < 8 else "test") for n in range(10)]
    rows[9]["split"] = "val"
    source = jsonl_source(write_jsonl(tmp_path / "records.jsonl", rows))
    prepared = run_prepare([source], tmp_path / "prepared", tokenizer=Words(), tokenizer_name="words")
    total = prepared.manifest["tokens"]["train"]["total"]
    found = size(data=described(tmp_path / "prepared"), training=training())
    assert found.records == 8 and found.mean_tokens * 8 == pytest.approx(total)
    assert found.basis.startswith("counted in ")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"counts": {}}', '{"counts": {"train": 5, "val": 1}}',
        *(json.dumps({"counts": {"train": train, "val": val}, "tokens": tokens}) for train, val, tokens in [  # type: ignore[var-annotated]
            (0, 0, None), (-1, 0, None), (5, -1, None), ("many", 0, None), (None, 0, None), (float("inf"), 0, None),
            (5, 1, 7), (5, 1, "x"), (5, 1, {"val": {}}), (5, 1, {"train": {"all": 1}}), (5, 1, {"train": {"total": 0}}),
            (5, 1, {"train": {"total": -9}}), (5, 1, {"train": {"total": float("nan")}}),
            (5, 1, {"train": {"total": float("inf")}}), (5, 1, {"train": {"total": "x"}}),
        ]),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused_with_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    message = refused("data.bad_manifest", data={"output_dir": str(tmp_path)})
    assert message.startswith(f"{tmp_path}/manifest.json: not a manifest of prepared data (")
    assert message.endswith("run `finetune data prepare`")


def test_a_binary_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert "not a manifest of prepared data" in refused("data.bad_manifest", data={"output_dir": str(tmp_path)})


# assumed


def test_a_set_that_was_prepared_with_other_settings_is_not_counted(tiny_data: Path) -> None:
    found = size(data=described(tiny_data) | {"max_train_records": 4}, plan={"mean_tokens": 50.0})
    assert found.records == 4
    assert found.basis.endswith(f"; not counted, because {tiny_data} was prepared from other files or settings")
    other = run_config(data=described(tiny_data) | {"test_fraction": 0.5}, plan={"questions": 7})
    questions = evaluation_size(other)
    assert questions and questions.questions == 7


def test_without_a_prepared_folder_the_values_of_the_config_are_used_and_labelled(tmp_path: Path) -> None:
    data = {"output_dir": str(tmp_path / "absent"), "val_fraction": 0.1, "test_fraction": 0.1}
    found = size(data=data, plan={"records": 800, "mean_tokens": 311.4}, training=training(max_steps=10, eval_steps=10))
    assert (found.records, found.mean_tokens) == (800, 311.4)
    assert found.validation_tokens == pytest.approx(100 * 311.4)  # 800 are 80%
    assert found.basis == (
        f"800 training examples (plan.records), 311 tokens each (plan.mean_tokens); not counted, because "
        f"{tmp_path}/absent is not prepared"
    )


def local(tmp_path: Path, *sources: dict[str, Any], **data: Any) -> RunSize:
    sections = {
        "sources": list(sources),
        "output_dir": str(tmp_path / "absent"),
        "val_fraction": 0.1,
        "test_fraction": 0.1,
    }
    return size(data=sections | data, plan={"records": None}, training=training(max_steps=1, eval_steps=1))


def test_local_sources_are_counted_without_the_held_out_part(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [*(row(n) for n in range(60)), "", "  "])
    (tmp_path / "spider").mkdir()
    for name, count in (("one.json", 30), ("two.json", 10), ("other.json", 500)):
        (tmp_path / "spider" / name).write_text(json.dumps([{}] * count))
    jsonl = {"kind": "jsonl", "path": str(lines)}
    spider = {"kind": "spider", "path": str(tmp_path / "spider"), "files": ["one.json", "two.json"]}
    found = local(tmp_path, jsonl, spider)
    assert found.records == 80 and found.validation_tokens == pytest.approx(10 * found.mean_tokens)
    assert found.basis.startswith(
        "80 training examples (counted in the local sources, less the held-out fractions), 300 "
    )
    assert local(tmp_path, jsonl | {"split": "train"}, spider).records == 60 + 32  # nothing is held out of `train`
    assert local(tmp_path, jsonl, spider | {"split": "test"}).records == 48
    assert local(tmp_path, jsonl | {"split": "val"}, spider).records == 32


def test_max_train_records_limits_training_but_not_validation(tmp_path: Path) -> None:
    jsonl = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [row(n) for n in range(100)]))}
    found = local(tmp_path, jsonl, max_train_records=20)
    assert found.records == 20 and found.validation_tokens == pytest.approx(10 * found.mean_tokens)
    assert found.basis.startswith("20 training examples (data.max_train_records, of 80: counted in the local sources")
    assert local(tmp_path, jsonl, max_train_records=200).records == 80
    capped = size(data={"max_train_records": 20}, plan={"records": 50})
    assert capped.records == 20 and "data.max_train_records, of 50: plan.records" in capped.basis


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "huggingface", "path": "someone/questions", "columns": {"question": "q", "sql": "s"}},
        {"kind": "jsonl", "path": "absent.jsonl"},
        {"kind": "spider", "path": "someone/spider", "files": ["train.json"]},
        {"kind": "spider", "path": ".", "files": []},
        {"kind": "jsonl", "path": "empty.jsonl"},
        {"kind": "jsonl", "path": "here.jsonl", "split": "test"},
    ],
)
def test_data_of_unknown_size_is_refused_with_a_remedy(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    write_jsonl(tmp_path / "here.jsonl", [row(1)])
    message = refused("data.unknown_size", data={"sources": [source], "output_dir": "absent"}, plan={"records": None})
    assert message.startswith("absent: the data are not prepared, so their size is unknown; run `finetune data")
    assert "plan.records" in message


def test_one_source_of_unknown_size_is_enough_to_refuse(tmp_path: Path) -> None:
    known = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [row(n) for n in range(9)]))}
    unknown = {"kind": "spider", "path": "someone/spider", "files": ["train.json"]}
    with raises("data.unknown_size"):
        local(tmp_path, known, unknown)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"7", None])
def test_a_local_source_that_cannot_be_read_is_refused_with_its_path(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "train.json").write_bytes(content)
    with raises("file.unreadable", match=rf"^{tmp_path}: cannot be read \("):
        local(tmp_path, {"kind": "spider", "path": str(tmp_path), "files": ["train.json"]})
