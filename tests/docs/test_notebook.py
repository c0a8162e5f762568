"""The notebook runs from its first cell to its last, in a fresh checkout with an empty home folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.doc_pages import DOCS
from tests.helpers.fresh_checkout import empty_home, fresh_checkout

NOTEBOOK = DOCS / "notebooks" / "first_run.ipynb"


def test_it_is_committed_without_outputs() -> None:
    """They would be of some machine, at some time."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) > 6
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    checkout = fresh_checkout(tmp_path / "finetune")
    env = empty_home(tmp_path / "home") | {
        "NOTEBOOK_STEPS": "2",
        "NOTEBOOK_QUESTIONS": "4",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(checkout / "docs" / "notebooks")}}
    )
    with client.setup_kernel(env=env):
        for at, cell in enumerate(notebook.cells):
            client.execute_cell(cell, at)
    outputs = ["".join(_texts(cell)) for cell in notebook.cells if cell.cell_type == "code"]
    print(*outputs, sep="\n")
    assert "tuned: execution accuracy" in outputs[2] and "# notebook" in outputs[3]
    assert "'status': 'done'" in outputs[4] and "'questions': 4" in outputs[4] and outputs[5].strip()
    assert (checkout / "runs" / "notebook" / "report.html").is_file()


def _texts(cell: dict[str, object]) -> list[str]:
    found = []
    for output in cell["outputs"]:  # type: ignore[attr-defined]
        data = output.get("data", {})
        found.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
    return found
