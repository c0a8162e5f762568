"""The bars of a report say which databases training had no example of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.report.render import write_report
from finetune.report.source import read_run
from finetune.report.trained_databases import trained_databases
from finetune.runtime.files import sha256_file
from tests.helpers.report_fixtures import Page, build_run, change

ALL = ("bike_shop", "cargo_line", "clinic", "film_club", "library", "school")
MARK = "(not trained on)"
NOTE = "The databases without a mark were trained on, with other questions."


def run_of(folder: Path, train: Any, **evaluation: Any) -> Path:
    """A run with its prepared data. train: examples by database."""
    manifest = {
        "format": 1,
        "prompt": "1",
        "counts": {"train": 10, "val": 0, "test": 10},
        "files": {},
        "records_per_database": {"train": train},
    }
    prepared = folder / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    digest = sha256_file(prepared / "manifest.json")
    run = build_run(folder / "runs" / "demo")
    change(run / "run.json", data={"path": str(prepared), "manifest_sha256": digest, "counts": manifest["counts"]})
    change(run / "eval.json", **{"data_manifest_sha256": digest} | evaluation)
    return run


def pages(run: Path) -> tuple[str, str]:
    """The text of report.html up to the curves, and that of report.md without escapes."""
    write_report(run)
    html = Page((run / "report.html").read_text()).text.partition("Training curves")[0]
    return html, (run / "report.md").read_text().replace("\\", "")


def test_a_database_that_was_not_trained_on_is_marked(tmp_path: Path) -> None:
    run = run_of(tmp_path, {name: 40 for name in ALL if name not in ("school", "clinic")} | {"clinic": 0, "other": 3})
    for text in pages(run):
        assert f"school {MARK}" in text and f"clinic {MARK}" in text and text.count(MARK) == 2
        assert NOTE in text


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"another": 40}, "None of these databases was trained on."),
        (dict.fromkeys(ALL, 40), "All of these databases were trained on."),
    ],
)
def test_one_sentence_does_for_all_or_none(tmp_path: Path, train: dict[str, int], said: str) -> None:
    for text in pages(run_of(tmp_path, train)):
        assert MARK not in text and said in text


def test_without_the_data_of_the_training_nothing_is_said(tmp_path: Path) -> None:
    for place, run in enumerate(
        (
            build_run(tmp_path / "elsewhere"),
            run_of(tmp_path / "other questions", {"clinic": 1}, data_manifest_sha256="0" * 64),
            run_of(tmp_path / "odd", ["clinic"]),
            changed_since(run_of(tmp_path / "changed", {"clinic": 1})),
        )
    ):
        assert trained_databases(read_run(run)) is None, place
        assert all(MARK not in text and "trained on." not in text for text in pages(run))


def changed_since(run: Path) -> Path:
    manifest = run.parent.parent / "prepared" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    return run


def test_the_difficulties_are_explained_below_their_bars(tmp_path: Path) -> None:
    for text in pages(build_run(tmp_path / "demo")):
        assert (
            "Easy, medium, hard, extra: Spider's difficulty, by how many clauses, conditions and nested queries" in text
        )
