"""`finetune export` from the command line: what ships loads elsewhere, is scored, and is whole or not there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune.cli.main import main
from finetune.data.prompts import load_template
from finetune.evaluation.questions import questions_of
from finetune.export.export_folder import open_export
from finetune.models import weight_files
from finetune.models.adapter import seal_adapter
from finetune.models.device import Device
from finetune.models.load import load_adapter, load_base
from finetune.run_folder import RunFolder
from finetune.serve.target import open_target
from tests.helpers.errors import raises, reported
from tests.helpers.model_examples import change

ROOT = Path(__file__).resolve().parents[2]
CPU = Device(torch.device("cpu"), torch.float32)


def export(run: RunFolder, *arguments: str, to: str = "merged") -> int:
    return main(["export", str(run.path), "--to", to, *arguments])


def manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return values


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


# what ships


def test_plain_transformers_loads_the_merged_model(exported: dict[str, Path], scored_run: RunFolder) -> None:
    folder, config = exported["merged"], scored_run.config()
    base = load_base(config.model, config.quantization, CPU, dequantize=True)
    expected = load_adapter(base, scored_run.adapter, config.lora, config.model).merge_and_unload()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights, wanted = model.state_dict(), expected.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert torch.allclose(logits(model, [5, 6, 7, 8]), logits(expected, [5, 6, 7, 8]), atol=1e-5)
    defaults = GenerationConfig.from_pretrained(folder)
    assert (defaults.do_sample, defaults.max_new_tokens, defaults.eos_token_id) == (False, 12, [2])
    questions = questions_of(config, load_template(scored_run.adapter))
    record = questions.records[0]
    messages = [{"role": "system", "content": record.schema + "\n"}, {"role": "user", "content": record.question}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == questions.prompts[0]


def test_plain_peft_loads_the_adapter(exported: dict[str, Path], scored_run: RunFolder) -> None:
    from peft import AutoPeftModelForCausalLM

    folder, config = exported["adapter"], scored_run.config()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.model.name and isinstance(settings["target_modules"], list)
    plain = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = load_base(config.model, type(config.quantization)(load_in_4bit=False), CPU)
    ours = load_adapter(whole, folder, config.lora, config.model)
    found = logits(plain, [5, 6, 7, 8])
    assert torch.allclose(found, logits(ours, [5, 6, 7, 8]), atol=1e-5)
    with plain.disable_adapter():
        assert not torch.allclose(found, logits(plain, [5, 6, 7, 8]), atol=1e-2)


def test_every_export_is_scored_on_the_runs_questions(exported: dict[str, Path]) -> None:
    for kind, folder in exported.items():
        found = manifest(folder)
        score = found["scores"][kind]
        assert (score["questions"], score["same_sql"], score["won"], score["lost"], score["p"]) == (6, 6, 0, 0, 1.0)
        assert score["generator"]["name"] == "hf" and score["split"] == "test"
        card = (folder / "README.md").read_text()
        assert f"| {kind} | 0 of 6 (0.0%) | 0.0% to 39.0% | 0 | 0 | 0 | 1 |" in card
    assert manifest(exported["merged"])["base"] == "dequantized"
    assert (
        "the 4-bit weights that the adapter was trained on, de-quantised"
        in (exported["merged"] / "README.md").read_text()
    )


def test_no_file_names_a_path_of_this_machine(exported: dict[str, Path], scored_run: RunFolder) -> None:
    """Apart from the base model that PEFT has to find."""
    for folder in exported.values():
        for path in folder.iterdir():
            if path.suffix in (".json", ".md", ".jinja") and path.name not in ("adapter_config.json", "base.json"):
                assert str(scored_run.path.parent) not in path.read_text(), path
                assert str(scored_run.config().model.name) not in path.read_text(), path


def test_gguf_files_are_scored_one_by_one(run: RunFolder) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")
    assert export(run, to="gguf") == 0
    found = open_export(run.path / "exports" / "gguf", "q4_k_m", verify=True)
    assert (found.kind, found.model.name, found.dtype, list(found.gguf)) == (
        "gguf",
        "model-q4_k_m.gguf",
        "q4_k_m",
        ["q8_0", "q4_k_m"],
    )
    assert {name: score["generator"]["name"] for name, score in found.manifest["scores"].items()} == dict.fromkeys(
        found.gguf, "llama_cpp"
    )
    modelfile = (found.path / "Modelfile.q4_k_m").read_text()
    before, _, after = load_template(run.adapter).render(schema="<s>", question="<q>").partition("<s>")
    prompt = f"{before}{{{{ .System }}}}{after.replace('<q>', '{{ .Prompt }}')}"
    assert (
        f'FROM ./model-q4_k_m.gguf\nTEMPLATE """{prompt}"""\n' in modelfile and "PARAMETER temperature 0\n" in modelfile
    )
    with raises("export.no_quantization"):
        open_export(found.path, "q2_k")


def test_the_same_export_is_not_made_again(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, to="adapter") == 0
    written = (run.path / "exports" / "adapter" / "export.json").stat().st_mtime_ns
    capsys.readouterr()
    assert export(run, to="adapter") == 0
    assert "up to date" in capsys.readouterr().out
    assert (run.path / "exports" / "adapter" / "export.json").stat().st_mtime_ns == written
    with reported("export.exists"):
        assert export(run, "--no-score", to="adapter") == 2
    (run.path / "exports" / "adapter" / "README.md").write_text("less")
    with reported("export.damaged"):
        assert export(run, to="adapter") == 2


# the score decides


def all_right(run: RunFolder) -> None:
    """Let the run have answered all of its questions correctly, which it has not."""
    path = run.eval_rows("tuned")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"verdict": "correct"}) + "\n" for row in rows))


def test_a_significant_loss_is_refused_unless_accepted(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """6 lost of 6: p = 0.031."""
    all_right(run)
    target = run.path / "exports" / "merged"
    with reported("export.loss"):
        assert export(run) == 2
    assert not target.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert "won 0, lost 6, p = 0.031: a significant loss" in line and "--accept-loss" in line
    weights = target.with_name("merged.part") / "model.safetensors"
    inode = weights.stat().st_ino
    assert export(run, "--accept-loss") == 0
    assert (target / "model.safetensors").stat().st_ino == inode, "nothing was computed again"
    assert (
        manifest(target)["accepted_loss"] is True and manifest(target)["scores"]["merged"]["significant_loss"] is True
    )
    assert (
        "**merged answers significantly worse than the run; it was exported all the same"
        in (target / "README.md").read_text()
    )
    assert not weights.parent.exists()


def test_a_small_loss_is_said_and_not_refused(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    all_right(run)
    assert export(run, "--sample", "5", to="adapter") == 0
    assert "won 0, lost 5, p = 0.062: no significant loss" in capsys.readouterr().err
    assert manifest(run.path / "exports" / "adapter")["scores"]["adapter"]["questions"] == 5


def test_a_run_without_a_score_says_what_to_do(run: RunFolder) -> None:
    run.eval_json.rename(run.path / "kept.json")
    with reported("export.not_scored"):
        assert export(run) == 2
    assert not (run.path / "exports").exists()
    assert export(run, "--no-score", to="adapter") == 0
    assert manifest(run.path / "exports" / "adapter")["scores"] is None
    card = (run.path / "exports" / "adapter" / "README.md").read_text()
    assert "**This export was not scored.**" in card and "The run was not scored." in card
    (run.path / "kept.json").rename(run.eval_json)
    for damage in ("", "{}\n", "no json\n"):
        run.eval_rows("tuned").write_text(damage)
        with reported("export.not_scored"):
            assert export(run, "--output", str(run.path / "x")) == 2


def test_other_data_than_the_score_was_made_on(run: RunFolder) -> None:
    change(run.eval_json, data_manifest_sha256="0" * 64)
    with reported("export.data_changed"):
        assert export(run) == 2
    change(run.eval_json, rule=None)
    with reported("export.not_scored"):
        assert export(run) == 2


def test_the_same_limit_of_an_answer_as_in_the_score(run: RunFolder) -> None:
    """Which may have been overridden; an export with more of it would be compared with answers that were cut off."""
    assert main(["evaluate", str(run.path), "evaluation.max_new_tokens=3"]) == 0
    assert export(run, "--accept-loss", to="adapter") == 0
    found = manifest(run.path / "exports" / "adapter")["scores"]["adapter"]
    assert found["same_sql"] == found["questions"]


# whole or not there

KILLED = """
import os, signal, sys
from finetune.cli.main import main
from finetune.export import part_folder, rescore
from finetune.models import merging
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
place = sys.argv[2]
if place == "weights":
    parts, count = merging.MergedWeights.parts, [0]
    def some(self, name):
        count[0] += 1
        if count[0] > 9: die()
        yield from parts(self, name)
    merging.MergedWeights.parts = some
elif place == "score":
    rescore.judged_rows = die
else:
    part_folder.os.rename = die
main(["export", sys.argv[1], "--to", "merged"])
"""


@pytest.mark.parametrize(("place", "kept"), [("weights", False), ("score", True), ("rename", True)])
def test_a_killed_export_leaves_nothing_and_goes_on(run: RunFolder, place: str, kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run.path), place], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9
    target = run.path / "exports" / "merged"
    weights = target.with_name("merged.part") / "model.safetensors"
    assert not target.exists() and weights.exists()
    with raises("export.missing"):
        open_export(weights.parent if place != "rename" else target)
    before = weights.stat()
    assert export(run) == 0
    after = (target / "model.safetensors").stat()
    same = (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert same is kept, "a half-written file is written anew, a whole one is taken"
    assert not weights.parent.exists() and not [path for path in target.iterdir() if path.name.startswith(".")]
    assert manifest(target)["scores"]["merged"]["same_sql"] == 6


def test_weights_that_changed_meanwhile_are_written_again(run: RunFolder) -> None:
    all_right(run)
    with reported("export.loss"):
        assert export(run) == 2
    part = run.path / "exports" / "merged.part"
    content = (part / "model.safetensors").read_bytes()
    (part / "model.safetensors").write_bytes(content[:-4] + b"abcd")
    assert export(run, "--accept-loss") == 0
    assert (run.path / "exports" / "merged" / "model.safetensors").read_bytes() == content


def test_what_is_begun_anew_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    part = run.path / "exports" / "adapter.part"
    part.mkdir(parents=True)
    (part / ".finetune-export").touch()
    (part / "adapter_model.safetensors").write_bytes(b"half")
    assert export(run, "--no-score", to="adapter") == 0
    assert "adapter.part: what an earlier attempt left there is not whole" in capsys.readouterr().err
    assert not part.exists()


@pytest.mark.parametrize("what", ["a folder", "a file", "a link"])
def test_what_somebody_has_in_place_of_the_unfinished_export_stays(run: RunFolder, tmp_path: Path, what: str) -> None:
    part = tmp_path / "place.part"
    if what == "a file":
        part.write_text("mine")
    else:
        folder = tmp_path / "elsewhere" if what == "a link" else part
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        if what == "a link":
            part.symlink_to(folder)
    with reported("export.exists"):
        assert export(run, "--no-score", "--output", str(tmp_path / "place"), to="adapter") == 2
    assert (part if what == "a file" else part / "mine.txt").read_text() == "mine" and not (tmp_path / "place").exists()


def test_the_folder_of_the_shell_is_no_place(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with reported("export.exists"):
        assert export(run, "--no-score", "--output", ".", to="adapter") == 2


def test_an_export_killed_after_its_rename_is_tidied(run: RunFolder) -> None:
    assert export(run, "--no-score", to="adapter") == 0
    target = run.path / "exports" / "adapter"
    for name in (".answers-adapter.jsonl", ".stage.json", ".finetune-export"):
        (target / name).write_text("{}")
    assert export(run, "--no-score", to="adapter") == 0
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]


def test_two_at_once(run: RunFolder) -> None:
    part = run.path / "exports" / "adapter.part"
    part.mkdir(parents=True)
    handle = os.open(part, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with reported("export.busy"):
        assert export(run, to="adapter") == 2
    os.close(handle)
    assert export(run, to="adapter") == 0


@pytest.mark.parametrize("what", ["a file", "a folder with a file", "a link"])
def test_what_is_there_already_is_never_replaced(run: RunFolder, tmp_path: Path, what: str) -> None:
    target = tmp_path / "place"
    if what == "a file":
        target.write_text("mine")
    elif what == "a link":
        (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with reported("export.exists"):
        assert export(run, "--output", str(target), to="adapter") == 2
    assert target.is_symlink() or (target if target.is_file() else target / "mine").read_text() == "mine"


def test_a_full_disk_leaves_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000)))
    with reported("disk.full"):
        assert export(run) == 2
    assert not (run.path / "exports" / "merged").exists()


def test_an_adapter_of_another_base_is_refused(run: RunFolder) -> None:
    change(run.adapter / "base.json", weights="0" * 64)
    seal_adapter(run.adapter)
    with reported("adapter.other_base"):
        assert export(run) == 2
    shutil.rmtree(run.adapter)
    with reported("adapter.missing"):
        assert export(run) == 2


# options and damaged folders


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--to", "gguf", "--quantize", "q3_x"], "export.bad_option"),
        (["--to", "gguf", "--quantize", ","], "export.bad_option"),
        (["--to", "adapter", "--dtype", "float16"], "export.bad_option"),
        (["--to", "adapter", "--base", "original"], "export.bad_option"),
        (["--to", "merged", "--private"], "cli.conflicting_options"),
        (["--to", "merged", "--no-score", "--accept-loss"], "cli.conflicting_options"),
    ],
)
def test_options_that_make_no_sense(scored_run: RunFolder, arguments: list[str], code: str) -> None:
    with reported(code):
        assert main(["export", str(scored_run.path), *arguments]) == 2
    assert not (scored_run.path / "exports").exists()


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "export.json").unlink(), "export.missing"),
    (lambda folder: (folder / "export.json").write_text("{"), "export.damaged"),
    (lambda folder: (folder / "export.json").write_text("[]"), "export.damaged"),
    (lambda folder: change(folder / "export.json", format=2), "export.other_version"),
    (lambda folder: change(folder / "export.json", kind="else"), "export.damaged"),
    (lambda folder: change(folder / "export.json", end_ids=["2"]), "export.damaged"),
    (lambda folder: change(folder / "export.json", gguf={"q8_0": "../x"}, kind="gguf"), "export.damaged"),
    (lambda folder: change(folder / "export.json", files={"../x": {"bytes": 1, "sha256": ""}}), "export.damaged"),
    (lambda folder: change(folder / "export.json", base_model={}), "export.damaged"),
    (lambda folder: change(folder / "export.json", base_model={"name": 5, "revision": None}), "export.damaged"),
    (lambda folder: change(folder / "export.json", end_ids=[-5]), "export.damaged"),
    (lambda folder: change(folder / "export.json", max_new_tokens=0), "export.damaged"),
    (lambda folder: change(folder / "export.json", context_tokens=True), "export.damaged"),
    (lambda folder: change(folder / "export.json", files={}), "export.damaged"),
    (lambda folder: change(folder / "export.json", gguf={"q8_0": []}, kind="gguf"), "export.damaged"),
    (lambda folder: change(folder / "export.json", run=None), "export.damaged"),
    (lambda folder: change(folder / "export.json", quantization={"bits": 4}), "export.damaged"),
    (lambda folder: change(folder / "export.json", quantization={"load_in_4bit": "no"}), "export.damaged"),
    (lambda folder: change(folder / "export.json", quantization="none"), "export.damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "export.damaged"),
    (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), "export.damaged"),
    (lambda folder: flip(folder / "adapter_model.safetensors"), "export.damaged"),
]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "code"), DAMAGES, ids=[str(n) for n in range(len(DAMAGES))])
def test_a_damaged_export_is_refused(
    exported: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], code: str
) -> None:
    folder = Path(shutil.copytree(exported["adapter"], tmp_path / "adapter"))
    assert open_export(folder, verify=True).model == folder
    damage(folder)
    with raises(code):
        open_export(folder, verify=True)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer_config.json"])
def test_a_file_of_the_same_size_with_other_content_is_found(
    exported: dict[str, Path], scored_run: RunFolder, tmp_path: Path, name: str
) -> None:
    """By the export's name and size alone, the weights of another training would be taken for these."""
    folder = Path(shutil.copytree(exported["merged"], tmp_path / "merged"))
    open_target(folder)
    flip(folder / name)
    with raises("export.damaged", match=f"{name} has changed"):
        open_target(folder)
    with reported("export.damaged"):
        assert export(scored_run, "--output", str(folder)) == 2


def test_a_folder_that_is_neither_a_run_nor_an_export(tmp_path: Path) -> None:
    (tmp_path / "merged.part").mkdir()
    with raises(
        "run.not_found", match=r"no export.json\) \(an export is unfinished while its folder is called NAME.part"
    ):
        open_target(tmp_path / "merged.part")


def test_the_card_says_what_is_not_known(exported: dict[str, Path]) -> None:
    card = (exported["merged"] / "README.md").read_text()
    assert "licence: unknown" in card and "one database: nothing can be said" in card
    assert re.search(r"cost: \$\d+\.\d+ of training for 0\.\d\d hours of all attempts \(.*measured", card)
    assert "6 steps" in card and "LoRA r=4, alpha=8" in card
