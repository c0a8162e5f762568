"""A local disk that fills up during a save keeps no half of it."""

from __future__ import annotations

from pathlib import Path

from finetune.training.staging import LABELS, remove_half_saves


def test_a_save_without_its_last_file_is_removed_and_a_complete_one_stays(tmp_path: Path) -> None:
    for name, files in (
        ("checkpoint-3", ["optimizer.pt", LABELS]),
        ("checkpoint-6", ["optimizer.pt"]),
        ("checkpoint-9", []),
    ):
        (tmp_path / name / "ledger").mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("x")
    remove_half_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    remove_half_saves(tmp_path / "absent")
