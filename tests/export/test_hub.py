"""An upload against a hub in this process: what arrives is the export, byte for byte, and the token is nowhere shown."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.export import hub as module
from finetune.export.hub import check_repository
from finetune.run_folder import RunFolder
from tests.helpers.errors import raises, reported
from tests.helpers.fake_hub import TOKEN, FakeHub, fake_hub

REPOSITORY = "somebody/sql-model"
PROGRAM = """
import sys
from pathlib import Path
from finetune.errors import UserError
from finetune.export.hub import upload
try:
    print(upload(Path(sys.argv[1]), sys.argv[2], private=len(sys.argv) > 3))
except UserError as error:
    sys.exit(f"{error.code} {error}")
"""


def upload(folder: Path, hub: FakeHub, *private: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | variables
    environment |= {"HF_HOME": str(folder.parent / "hf-home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", PROGRAM, str(folder), REPOSITORY, *private]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_arrives_whole(exported: dict[str, Path], kind: str) -> None:
    with fake_hub() as hub:
        done = upload(exported[kind], hub, "--private")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.url}/{REPOSITORY}"
    assert hub.private == {REPOSITORY: True} and hub.messages == [f"{kind} export of tiny-001"]
    local = {path.name: path.read_bytes() for path in exported[kind].iterdir()}
    weights = "model.safetensors" if kind == "merged" else "adapter_model.safetensors"
    assert hub.files[REPOSITORY] == local and {weights, "README.md", "export.json"} <= local.keys()


def test_only_files_of_the_export_are_uploaded(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported["adapter"], tmp_path / "adapter"))
    for name in (".env", "notes.txt", ".answers-adapter.jsonl"):
        (folder / name).write_text("secret")
    with fake_hub() as hub:
        assert upload(folder, hub).returncode == 0
    assert hub.files[REPOSITORY].keys() == {path.name for path in exported["adapter"].iterdir()}


@pytest.mark.parametrize(
    ("status", "word"), [(401, "hf auth login"), (403, "write access"), (404, "no such place"), (400, "")]
)
def test_a_refusal_is_one_line(exported: dict[str, Path], status: int, word: str) -> None:
    with fake_hub() as hub:
        hub.refuse = status
        done = upload(exported["adapter"], hub)
    *_, line = done.stderr.splitlines()
    code, _, message = line.partition(" ")
    assert (done.returncode, code) == (1, "export.hub_refused")
    assert message.startswith(f"{REPOSITORY}: not uploaded") and word in message


def test_a_public_repository_gets_no_private_upload(exported: dict[str, Path]) -> None:
    with fake_hub() as hub:
        hub.private[REPOSITORY] = False
        done = upload(exported["adapter"], hub, "--private")
        assert done.stderr.split()[0] == "export.public" and hub.files == {}
        assert upload(exported["adapter"], hub).returncode == 0, "without --private it is uploaded"


def test_a_hub_that_is_down(exported: dict[str, Path]) -> None:
    with fake_hub() as hub:
        pass
    done = upload(exported["adapter"], hub)
    assert done.stderr.splitlines()[-1].split()[0] == "export.hub_unreachable" and "Traceback" not in done.stderr


def test_the_command_exports_first_and_then_uploads(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, str, bool]] = []

    def upload(folder: Path, repository: str, *, private: bool) -> str:
        seen.append((folder, repository, private))
        return "its address"

    monkeypatch.setattr(module, "upload", upload)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    command = ["export", str(run.path), "--to", "hub", "--repo", REPOSITORY, "--private", "--no-score"]
    assert main([*command, "--upload", "adapter"]) == 0
    assert seen == [(run.path / "exports" / "adapter", REPOSITORY, True)]


def test_what_can_be_known_before_the_work(scored_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["export", str(scored_run.path), "--to", "hub"]
    with reported("cli.missing_option"):
        assert main(command) == 2
    for name in ("no-owner", "a/b/c", "a b/c", "../x"):
        with raises("export.bad_option"):
            check_repository(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with reported("export.no_token"):
        assert main([*command, "--repo", REPOSITORY]) == 2
    assert not (scored_run.path / "exports").exists()
