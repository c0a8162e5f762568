"""Names from files stay inside their folder, and nothing outside of it is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.runtime.confined import is_relative_name, remove_file, remove_tree, within
from tests.helpers.errors import raises

ESCAPES = (
    *("..", "../x", "a/../../x", "x/../some/folder", "/etc/passwd", "", ".", "./a", "a//b", "a/", "a\\b"),
    *("a\0b", "a\nb", "\u202etxt", None, 7, ["a"], {"a": 1}, True),
)


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_a_name_that_leaves_the_folder_is_none(name: object, tmp_path: Path) -> None:
    assert not is_relative_name(name)
    assert within(tmp_path, name) is None


def test_a_name_inside_is_a_path_and_a_link_out_of_the_folder_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "in").symlink_to(folder / "eval")
    assert within(folder, "eval/base.jsonl") == folder / "eval" / "base.jsonl"
    assert within(folder, "in/base.jsonl") == folder / "in" / "base.jsonl"
    assert within(folder, "out/secret") is None


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder of the user's that must survive, beside the folder `run`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "kept" / "deep").mkdir(parents=True)
    (tmp_path / "kept" / "deep" / "thesis.txt").write_text("years of work")
    return tmp_path / "kept"


@pytest.mark.parametrize("name", ["..", ".", "../kept", "../kept/deep", "x/../../kept", "link/deep", "link/.."])
def test_nothing_outside_is_deleted(name: str, kept: Path) -> None:
    run = kept.parent / "run"
    (run / "link").symlink_to(kept)
    for remove in (remove_tree, remove_file):
        with raises("file.outside", match="is not inside"):
            remove(run / name, inside=run)  # type: ignore[operator]
    assert (kept / "deep" / "thesis.txt").read_text() == "years of work"


def test_a_link_is_deleted_and_not_followed(kept: Path) -> None:
    run = kept.parent / "run"
    for remove in (remove_tree, remove_file):
        (run / "adapter").symlink_to(kept)
        remove(run / "adapter", inside=run)  # type: ignore[operator]
        assert not (run / "adapter").is_symlink()
    assert (kept / "deep" / "thesis.txt").is_file()


def test_what_is_inside_is_deleted_also_through_a_linked_root(kept: Path) -> None:
    root = kept.parent / "linked"
    root.symlink_to(kept)
    remove_tree(root / "deep", inside=root)
    remove_tree(root / "deep", inside=root)  # it need not exist
    (kept / "file").write_text("")
    remove_file(root / "file", inside=kept)
    assert list(kept.iterdir()) == []
