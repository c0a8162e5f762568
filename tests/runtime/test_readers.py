"""Every reader of a file that we trust returns what the file may hold, or raises one short line, whatever is in the file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.budget.ledger import Ledger
from finetune.checkpoint.folders import read_manifest as read_checkpoint
from finetune.checkpoint.manifest import manifest_text
from finetune.cloud.catalog.csv_file import COLUMNS, read_clouds, read_prices
from finetune.cloud.gcloud import config as gcloud
from finetune.cloud.gcloud.quota import read_project, read_regions
from finetune.cloud.plan.task_yaml import _read as read_task
from finetune.cloud.plan.workload import _counted
from finetune.data.prepared import read_manifest
from finetune.data.prompts import PROMPT_FILE, load_template
from finetune.errors import UserError
from finetune.job.settings import read_settings
from finetune.machine import price
from finetune.machine.billed_time import MachineTime
from finetune.models.architectures import shape_of
from finetune.report.source import read_run
from finetune.run_record import read_record
from finetune.runtime.files import kind_of, load_json, parse_json, read_bytes, read_json, read_text
from finetune.runtime.yaml_file import load_yaml
from tests.helpers.errors import raises

HASH = "0" * 64
ODD: list[Any] = [
    *(None, True, [], {}, "", "x" * 5000, "a\x1b[2J\n", "\ud800", "../x", "/x", "\0", "9" * 400),
    *(-1, 0, 1.5, -0.0, 1e308, 10**30, 10**400, 2**63, [[1]], {"a": {"b": []}}, [None], ["x"], [{}], {"": 1}),
]
DEEP = "[" * 5_000
RAW: list[bytes] = [
    *(b"", b"\n", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{\0}\0", b"\xff", b"\0", b"{}", b"\xef\xbb\xbf{}"),
    *(
        DEEP.encode(),
        b'{"a":' * 5_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b"1" * 5000,
        b"- " * 9999,
    ),
]


@dataclass
class Format:
    """A file format of ours: a valid file, where it is, and what reads it."""

    name: str
    read: Callable[[Path], Any]
    valid: Any
    also: tuple[type[Exception], ...] = ()


def _text(path: Path, read: Callable[[str], Any]) -> Any:
    """For readers of text that another program has printed."""
    return read(path.read_bytes().decode("utf-8", "replace"))


def _environment(path: Path, name: str) -> dict[str, str]:
    return {name: path.read_bytes().decode("utf-8", "replace").replace("\0", ""), "CONFIG": "c.yaml"}


def _table(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(price.VARIABLE, raising=False)
        patched.setattr(price, "KEPT", str(path))
        table = price._table()
        return table and price.price_in(table, price.Machine("us-central1-a", True, "L4"))


def _meter(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("finetune.machine.billed_time.MARKER", path.name)
        return MachineTime(provisioned=True, home=path.parent, age=lambda: 1.0).seconds()


def _run(path: Path) -> Any:
    (path.parent / "run.json").write_text('{"status": "done"}')
    return read_run(path.parent)


def _credentials(path: Path) -> Any:
    found = gcloud._credentials(path, path.parent)
    return gcloud._text(found, "project_id", path)


def _skypilot(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SKYPILOT_GLOBAL_CONFIG", str(path))
        return gcloud._skypilot_project(), gcloud.skypilot_setting("jobs", "controller")


_STEP = {"step": 3, "number": 1, "attempt": 1, "run_id": "r", "config_hash": "c", "data_hash": "d", "saved_at": "t"}
_SCORES = {"correct": 1, "questions": 2, "execution_accuracy": 0.5, "execution_accuracy_interval95": [0.1, 0.9],
           "by_difficulty": {"easy": {"correct": 1, "questions": 2}}, "verdicts": {"correct": 1},
           "rows": "eval/base.jsonl"}  # fmt: skip
FORMATS = [
    Format("run.json", read_record, {"status": "done", "seed": 1, "attempts": 2, "history": [{"step": 1.0, "loss": 0.5}],
           "steps": {"done": 3, "planned": 4}, "data": {"counts": {"train": 3}}, "step": {"path": "lean"},
           "hardware": {"gpu": {"name": "L4", "compute_capability": [8, 9]}}, "attempt_log": [{"attempt": 1, "usd": 0.5}]}),
    Format("manifest.json", lambda path: read_manifest(path.parent), {"format": 1, "prompt": "p", "counts":
           {"train": 1, "val": 1, "test": 1}, "files": {"train.jsonl": {"bytes": 1, "sha256": HASH}}}),
    Format("step-3/manifest.json", lambda path: read_checkpoint(path.parent),
           {**_STEP, "files": {"a": {"bytes": 1, "sha256": HASH}}}),
    Format("manifest2.json", lambda path: _counted(path, 100.0, "m"),
           {"counts": {"train": 3, "val": 1}, "tokens": {"train": {"total": 30}}, "tokenizer": "m"}),
    Format("eval.json", _run, {"models": {"base": _SCORES, "tuned": None}, "split": "test",
           "gain": {"won": 1, "lost": 0, "both": 1, "neither": 0}}),
    Format(PROMPT_FILE, lambda path: load_template(path.parent), {"schema_format": "ddl", "version": "x", "identity": "x"}),
    Format("ledger/attempt-001.jsonl", lambda path: (a := Ledger(path.parent).account(), a.usd, a.hours),
           {"event": "begin", "at": "t", "attempt": 1, "token": "x", "metered_seconds": 1.0, "usd_per_hour": 0.5,
            "machine": {"zone": "z", "spot": True}, "step": 3}),
    Format("prices.json", _table, {"basis": "b", "ceiling_usd_per_hour": 1.0, "offers":
           [{"zone": "us-central1-a", "spot": True, "gpu": "L4", "usd_per_hour": 0.5}]}),
    Format("config.json", lambda path: shape_of(str(path.parent)), {"model_type": "llama", "hidden_size": 8,
           "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 8,
           "vocab_size": 9, "head_dim": 4}),
    Format("info", lambda path: read_settings(_environment(path, "SKYPILOT_CLUSTER_INFO")), {"cluster_name": "x"}),
    Format(".marker", _meter, {"machine": "m", "seconds": 1.0}),
    Format("credentials.json", _credentials, {"type": "service_account", "project_id": "p"}),
    Format("sky.yaml", _skypilot, {"active_workspace": "w", "workspaces": {"w": {"gcp": {"project_id": "p"}}}}),
    Format("regions", lambda path: _text(path, read_regions), [{"name": "r", "quotas":
           [{"metric": "m", "limit": 1.0, "usage": 0}]}], (ValueError,)),
    Format("project", lambda path: _text(path, read_project), {"quotas": [{"metric": "m", "limit": 1.0}]}, (ValueError,)),
    Format("task.yaml", read_task, {"resources": {"ordered": [{"zone": "z"}]}}),
]  # fmt: skip


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in _places(item, (*place, key)))]


def _changed(tree: Any, place: tuple[Any, ...], change: str, odd: Any) -> Any:
    if not place:
        return odd
    tree = copy.deepcopy(tree)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    if change == "remove":
        del parent[place[-1]]
    elif change == "rename" and isinstance(parent, dict) and isinstance(odd, str):
        parent[odd] = parent.pop(place[-1])
    else:
        parent[place[-1]] = odd
    return tree


@st.composite
def contents(draw: st.DrawFn, valid: Any) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(RAW) | st.binary(max_size=40))
    change = draw(st.sampled_from(["remove", "rename", "replace", "replace"]))
    tree = _changed(valid, draw(st.sampled_from(_places(valid))), change, draw(st.sampled_from(ODD)))
    text = json.dumps(tree)
    return text.encode()[: draw(st.sampled_from([None, len(text) // 2, len(text) - 1]))]


def _check(form: Format, path: Path) -> None:
    try:
        form.read(path)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 500
    except form.also as error:
        assert type(error) in form.also or isinstance(error, json.JSONDecodeError)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_valid_file_is_read(form: Format, tmp_path: Path) -> None:
    path = tmp_path / form.name
    path.parent.mkdir(exist_ok=True)
    path.write_text(manifest_text(form.valid) if form.name.startswith("step-") else json.dumps(form.valid))
    try:
        form.read(path)
    except UserError as error:
        assert error.code == "prompt.mismatch"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_whatever_is_in_the_file_it_is_read_or_one_short_line(
    form: Format, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("reader") / form.name
    path.parent.mkdir(exist_ok=True)

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents(form.valid))
    def any_content(content: bytes) -> None:
        if form.name.startswith("step-"):  # resealed: the hash is right, and what it seals is not
            try:
                content = manifest_text(json.loads(content)).encode()
            except (ValueError, TypeError, RecursionError):
                pass
        path.write_bytes(content)
        _check(form, path)

    any_content()
    for content in RAW:
        path.write_bytes(content)
        _check(form, path)


@pytest.mark.parametrize(
    "form", [form for form in FORMATS if not form.also and form.name != "info"], ids=lambda f: f.name
)
def test_what_is_no_file_is_one_short_line_and_not_waited_for(form: Format, tmp_path: Path) -> None:
    path = tmp_path / form.name
    path.parent.mkdir(exist_ok=True)
    path.mkdir()
    _check(form, path)
    path.rmdir()
    os.mkfifo(path)
    _check(form, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    _check(form, path)
    path.unlink()
    path.symlink_to(path.name)
    _check(form, path)


# the parts

VMS_LINE = ["n1-standard-8", "8", "30", "L4", "1", "us-central1", "us-central1-a", "0.5", "0.2"]


_CELLS = st.sampled_from([*VMS_LINE, "nan", "-1", "1e999", '"', "\0", "x" * 5000, "1" * 400]) | st.text(max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(_CELLS, min_size=7, max_size=11), st.binary(max_size=20))
def test_any_catalog_is_read_or_one_short_line(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], end: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "catalog"
    for name in ("gcp/vms.csv", "common/accelerators.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        line = ",".join(COLUMNS) + "\n" + ",".join(cells) + "\n"
        (folder / name).write_bytes(line.encode("utf-8", "replace") + end)
    read_clouds(folder)
    try:
        read_prices(folder)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 500


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"1" * 400 + b"}", "a number of 400 digits"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        ('{"a": "ü"}'.encode("latin-1"), "not text in UTF-8 (byte 7)"),
        ('{"a": 1}'.encode("utf-16"), "not text in UTF-8 (byte 0)"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_a_json_file_that_is_none_says_why(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with raises("file.bad_json") as caught:
        read_json(path, "make it")
    assert why in str(caught.value)


def test_nan_is_no_json_unless_it_is_allowed() -> None:
    with pytest.raises(ValueError, match="NaN is no JSON"):
        parse_json('{"a": NaN}')


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_json(tmp_path / "a.json") == parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert str(parse_json('{"a": [NaN, -Infinity]}', nan=True)) == "{'a': [nan, -inf]}"


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    kinds = {"pipe": "a pipe", ".": "a folder", "/dev/null": "a device", "gone": "a broken link", "none": "nothing"}
    assert {name: kind_of(tmp_path / name) for name in kinds} == kinds
    for name, kind in [("pipe", "a pipe"), (".", "a folder"), ("/dev/null", "a device")]:
        with pytest.raises(OSError, match=f"is {kind}, not a file"):
            read_bytes(tmp_path / name)
    for name, number in (("x" * 300, 36), ("none", 2), ("gone", 2), ("a\0b", 22)):
        with pytest.raises(OSError) as caught:
            read_text(tmp_path / name)
        assert caught.value.errno == number
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "large", 10)


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2026-13-45", "a: " + "[\n" * 1000, "a: &a [*a", "!!python/object:os.system {}", "\0"]
)
def test_yaml_of_other_programs_is_read_or_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_yaml(text)
    assert len(str(caught.value).splitlines()) == 1
