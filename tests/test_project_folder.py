"""The machine's side of a project: renewed after an upgrade, without touching what the user has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import project_folder
from finetune.cloud.launch.travel import Luggage, check_program_travels
from finetune.project_folder import (
    ProjectFolder,
    machine_side,
    read_project,
    renew_machine_side,
    sha256_of,
    stale_files,
    wheels_in,
)
from tests.helpers.errors import raises


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    found = ProjectFolder(tmp_path, asked={"goal": "cheap"})
    for name, content in machine_side().items():
        project_folder.write_bytes(tmp_path / name, content)
        found.files[name] = sha256_of(tmp_path / name)
    found.write_marker()
    return found


def upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a `pip install` of a version with another wheel, another setup.sh and a new script."""
    now = machine_side()
    [wheel] = [name for name in now if name.endswith(".whl")]
    later = {name: content for name, content in now.items() if name != wheel}
    later |= {"on_machine/setup.sh": b"# later\n", "on_machine/new.sh": b"", wheel.replace("0.1.0", "0.2.0"): b"wheel"}
    monkeypatch.setattr(project_folder, "machine_side", lambda: later)


def luggage(folder: Path) -> Luggage:
    return Luggage(folder, False, (), frozenset(), ".skyignore")


def test_a_project_as_it_was_written_is_current(project: ProjectFolder) -> None:
    said: list[str] = []
    assert read_project(project.path) == project
    assert stale_files(project) == [] and renew_machine_side(project) == []
    check_program_travels(luggage(project.path), said.append)
    assert said == []


def test_after_an_upgrade_it_is_told_and_renewed(project: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    [old] = wheels_in(project.path)
    upgraded(monkeypatch)
    said: list[str] = []
    check_program_travels(luggage(project.path), said.append)
    assert "4 files" in said[0] and "`finetune launch` renews them" in said[0]
    renewed = renew_machine_side(project)
    assert set(renewed) == {"on_machine/setup.sh", "on_machine/new.sh", f"on_machine/{old.name}"} | {
        f"on_machine/{path.name}" for path in wheels_in(project.path)
    }
    assert [path.name for path in wheels_in(project.path)] == [old.name.replace("0.1.0", "0.2.0")]
    again = read_project(project.path)
    assert again is not None and stale_files(again) == []


def test_a_script_that_the_user_has_changed_stays(project: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    upgraded(monkeypatch)
    (project.path / "on_machine/setup.sh").write_text("# mine")
    assert "on_machine/setup.sh" not in renew_machine_side(project)
    assert (project.path / "on_machine/setup.sh").read_text() == "# mine"


def test_what_a_kill_has_left_half_renewed_is_not_taken_for_the_users(
    project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next start is of yet another version."""
    upgraded(monkeypatch)
    real, written = project_folder.write_bytes, list[Path]()

    def killed(path: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(project_folder, "write_bytes", killed)
        renew_machine_side(project)
    newest = {name: content + b"# newest\n" for name, content in project_folder.machine_side().items()}
    monkeypatch.setattr(project_folder, "machine_side", lambda: newest)
    again = read_project(project.path)
    assert again is not None and str(written[0].relative_to(project.path)) in renew_machine_side(again)
    assert written[0].read_bytes().endswith(b"# newest\n") and stale_files(again) == []
    assert read_project(project.path) == again and not again.replaced


def test_a_wheel_that_is_not_there_is_refused_before_the_launch(project: ProjectFolder) -> None:
    """As in a clone of a project in git, which does not hold the wheel."""
    [wheel] = wheels_in(project.path)
    wheel.unlink()
    with raises("launch.no_wheel", match="finetune launch"):
        check_program_travels(luggage(project.path), print)
    assert renew_machine_side(project) == [f"on_machine/{wheel.name}"]
    check_program_travels(luggage(project.path), print)


def test_a_checkout_has_no_such_side(tmp_path: Path) -> None:
    assert read_project(tmp_path) is None
    check_program_travels(luggage(tmp_path), print)


def test_a_folder_that_cannot_be_written_is_one_line(project: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    upgraded(monkeypatch)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with raises("disk.full"):
        renew_machine_side(project)
