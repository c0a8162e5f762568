"""A run's folder: every run gets a new one, an existing one is never reused; and the recorded versions of the code."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from finetune import run_folder
from finetune.config.load import config_hash, from_dict, load_config
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.run_folder import RunFolder, create_run, git_state, open_run, package_versions
from finetune.run_record import RunRecord
from tests.helpers.data_examples import files_of
from tests.helpers.errors import raises

FILE = Path("configs/tiny.yaml")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def config(root: Path, run_name: str | None = None) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"name": "models/tiny"},
        "data": {"sources": [{"kind": "jsonl", "path": "a.jsonl"}], "output_dir": "data/prepared"},
        "training": {"output_dir": str(root), "run_name": run_name},
    }
    return from_dict(values, "test")


def test_a_run_folder_holds_the_config_it_was_made_with(root: Path) -> None:
    expected = config(root, "first")
    run = create_run(expected, FILE)
    assert run.path == root / "first"
    assert config_hash(load_config(run.config_yaml)) == config_hash(run.config()) == config_hash(expected)
    assert run.config_yaml.read_text().startswith("# finetune train configs/tiny.yaml\n")


def test_without_a_name_every_run_gets_the_next_number(root: Path) -> None:
    assert [create_run(config(root), FILE).path.name for _ in range(2)] == ["tiny-001", "tiny-002"]
    (root / "tiny-0041").mkdir()
    (root / "tiny-0099.old").mkdir()
    (root / "another-500").mkdir()
    assert create_run(config(root), FILE).path.name == "tiny-042"
    assert create_run(config(root), Path("another.yaml")).path.name == "another-501"


@pytest.mark.parametrize("existing", ["a run", "an empty folder", "a file", "a dangling link"])
def test_a_taken_name_is_refused_and_the_existing_one_is_not_touched(existing: str, root: Path) -> None:
    root.mkdir()
    if existing == "a run":
        create_run(config(root, "mine"), FILE)
    elif existing == "an empty folder":
        (root / "mine").mkdir()
    elif existing == "a file":
        (root / "mine").write_text("mine")
    else:
        (root / "mine").symlink_to(root / "nowhere")
    before = files_of(root)
    with raises("run.name_taken", match=r"runs/mine: already exists.*--resume .*runs/mine.*training\.run_name"):
        create_run(config(root, "mine"), Path("other.yaml"))
    assert files_of(root) == before
    assert [path.name for path in root.iterdir()] == ["mine"]


BAD_NAMES = (
    *(
        "",
        ".",
        "..",
        "a/b",
        "/tmp",
        ".hidden",
        "a\\b",
        "../x",
        "a\nb",
        "a\n",
        "\n",
        "a\rb",
        "a\0b",
        "a\x1b[2Jb",
        "a\x7f",
        "a\x85b",
    ),
    *(
        "a\u2028b",
        "a\u2029b",
        "a\u202etxt",
        "\ufeffa",
        "a\udcffb",
        " a",
        "a ",
        "\u3000a",
        "-rf",
        "--resume",
        "a" * 101,
        "\u65e5" * 90,
    ),
    *("base", "Base", "BASE"),
)


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_is_no_folder_name_is_refused(name: str, root: Path) -> None:
    """In a config, on the command line and where a run's config is read back, and for a config that was made otherwise."""
    code = "config.bad_type" if {"\0", "\udcff"} & set(name) else "config.bad_value"  # what no file name can hold
    with raises(code, match=r"training\.run_name: expected"):
        config(root, name)
    unchecked = config(root)
    unchecked.training.run_name = name
    with raises("run.bad_name", match=r"^training\.run_name: expected a"):
        create_run(unchecked, FILE)
    assert not root.exists()


@pytest.mark.parametrize(
    "name", ["a", "a" * 100, "gr\u00fc\u00df\u2192\u65e5", "1.10", "a b", "based", "base-001", "a.b_c-d"]
)
def test_other_names_are_accepted(name: str, root: Path) -> None:
    assert create_run(config(root, name), FILE).path.name == name


@pytest.mark.parametrize("stem", ["a\nb", "-rf", ".hidden", "b" * 120])
def test_a_config_file_that_cannot_name_a_run(stem: str, root: Path) -> None:
    with raises("run.bad_name", match=r"a run cannot be named after it: .*set training\.run_name"):
        create_run(config(root), Path(f"{stem}.yaml"))
    assert create_run(config(root, "named"), Path(f"{stem}.yaml")).path.name == "named"


def test_runs_that_start_at_once_get_folders_of_their_own(root: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: create_run(config(root), FILE).path, range(48)))
    assert sorted(path.name for path in found) == [f"tiny-{n:03d}" for n in range(1, 49)]


def test_of_runs_that_start_at_once_under_one_name_only_one_gets_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if all of them had checked at the same moment
    monkeypatch.setattr(run_folder, "check_name_is_free", lambda training: None)

    def start(_: int) -> str:
        try:
            return create_run(config(root, "mine"), FILE).path.name
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(start, range(16)))
    assert results.count("mine") == 1
    assert sum("already exists" in result for result in results) == 15


def test_a_folder_whose_config_cannot_be_written_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError(f"{path}: no space left on the disk", code="disk.full")

    monkeypatch.setattr(run_folder, "write_text", full)
    with raises("disk.full"):
        create_run(config(root), FILE)
    assert list(root.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(root: Path) -> None:
    root.write_text("not a folder")
    with raises("disk.error", match=r"runs: File exists"):
        create_run(config(root), FILE)
    with raises("disk.error", match=r"runs/below: Not a directory"):
        create_run(config(root / "below"), FILE)


def test_the_error_for_a_folder_without_a_run_lists_the_runs_beside_it(root: Path) -> None:
    run = create_run(config(root), FILE)
    assert open_run(run.path) == run
    with raises("run.not_found", match=r"runs/tiny-009: not a run folder.*; runs there: tiny-001"):
        open_run(root / "tiny-009")
    with raises("run.not_found", match=r"not a run folder \(no config.yaml in it\)$"):
        open_run(root / "nowhere" / "x")


def test_the_error_for_a_missing_record_names_the_command_that_writes_it(root: Path) -> None:
    run = create_run(config(root), FILE)
    with raises("file.missing", match=r"run\.json.*`finetune train CONFIG`"):
        run.record()
    record = RunRecord()
    record.status = "running"
    run.write_record(record)
    assert RunFolder(run.path).record() == record
    assert json.loads(run.run_json.read_text()) == {"status": "running"}


def test_the_commit_of_the_code_and_uncommitted_changes_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "checkout" / "finetune" / "runs.py"
    code.parent.mkdir(parents=True)
    code.write_text("# code\n")
    monkeypatch.setattr(run_folder, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state() == (None, False)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path / "checkout"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (code.parent / "untracked.txt").write_text("does not count")
    assert git_state() == (commit, False)
    code.write_text("# changed\n")
    assert git_state() == (commit, True)


def test_package_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "RECORDED_PACKAGES", ("omegaconf", "no-such-package-here"))
    assert package_versions() == {"omegaconf": metadata.version("omegaconf")}
