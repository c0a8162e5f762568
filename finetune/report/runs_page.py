"""All runs on one page: `finetune runs --html` writes index.html, with a table, dollars against accuracy, and any two compared.

The page compares by itself, from one bit for each question of each run. What may be compared, and the figures, are those of
`finetune compare`, whose reader gives the bits; what it refuses is named with its reason.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from finetune.errors import UserError
from finetune.evaluation.paired import is_right
from finetune.evaluation.score import Row
from finetune.evaluation.statistics import FEW_DATABASES, RESAMPLES, SEED
from finetune.report.compared import Compared, read_compared
from finetune.report.comparison import LEVEL
from finetune.report.pages import embedded, pages, script
from finetune.report.runs import RunRow
from finetune.report.source import Json
from finetune.runtime.files import as_text, kind_of, write_text

NAME = "index.html"
REPORT = "report.html"
OF_A_PAGE = r"(?:config\.yaml|run\.json|eval\.json|ledger/[^/]+\.jsonl|report\.html|eval/(?:tuned|base)\.jsonl)"
"""What a page needs of a run's folder."""
SCRIPTS = ("table.js", "statistics.js", "scatter.js", "runs.js")


def write_runs_page(folder: Path, rows: Sequence[RunRow], output: Path | None = None) -> Path:
    """Write the page of these rows of a folder's runs, by default as index.html in it. Returns its path. Raises UserError if it
    cannot be written there."""
    target = output or folder / NAME
    if kind_of(target) not in ("a file", "nothing"):
        raise UserError(
            f"{as_text(target)}: is {kind_of(target)}; give --output another file", code="runs.output_taken"
        )
    environment = pages()
    content = {
        "folder": as_text(folder),
        "runs": rows,
        "scored": sum(row.accuracy is not None for row in rows),
        "problems": sum(row.problem is not None for row in rows),
        "data": embedded(runs_data(folder, rows, target.parent)),
        "script": script(environment, *SCRIPTS),
    }
    write_text(target, environment.get_template("runs.html.j2").render(content))
    return target


def runs_data(folder: Path, rows: Sequence[RunRow], page: Path) -> Json:
    """For templates/runs.js. page: the folder of the page, which links are relative to."""
    sets = _QuestionSets()
    runs = []
    for row in rows:
        run = folder / row.name
        report = run / REPORT
        runs.append(
            {
                **row.as_dict(),
                "report": _link(report, page) if report.is_file() else None,
                "compared": sets.compared(run) if row.accuracy is not None else None,
                "given": as_text(run),
            }
        )
    return {
        "runs": runs,
        "sets": sets.found,
        "resamples": RESAMPLES,
        "seed": SEED,
        "level": LEVEL,
        "few_databases": FEW_DATABASES,
    }


def _link(report: Path, page: Path) -> str:
    """Relative, so that the whole folder may be moved; nothing in it is taken for a scheme such as javascript:."""
    return "./" + quote(os.fsencode(os.path.relpath(report, page)))


class _QuestionSets:
    """The questions that runs were asked: runs of one set were asked the same about the same databases."""

    def __init__(self) -> None:
        self.found: list[Json] = []
        self._places: dict[str, int] = {}

    def compared(self, run: Path) -> Json:
        """{"refused": why} for a run whose answers cannot be compared. bits: which questions are right, in the order of their
        ids, most significant bit first."""
        try:
            answers = read_compared(str(run))
        except UserError as error:
            return {"refused": str(error)}
        ids = sorted(answers.rows)
        right = [is_right(answers.rows[name]) for name in ids]
        return {
            "set": self._place(ids, answers.rows),
            "bits": base64.b64encode(_packed(right)).decode(),
            "judging": _judging(answers),
            "data": json.dumps(answers.data),
            "split": json.dumps(answers.split),
        }

    def _place(self, ids: Sequence[str], rows: Mapping[str, Row]) -> int:
        asked = [(name, rows[name].question, rows[name].db_id, rows[name].gold) for name in ids]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if key not in self._places:
            databases = sorted({db_id for _, _, db_id, _ in asked})
            number = {name: place for place, name in enumerate(databases)}
            self._places[key] = len(self.found)
            self.found.append({"databases": databases, "of": [number[db_id] for _, _, db_id, _ in asked]})
        return self._places[key]


def _judging(answers: Compared) -> dict[str, str]:
    return {str(key): json.dumps(value, sort_keys=True) for key, value in answers.judging.items()}


def _packed(bits: Sequence[bool]) -> bytes:
    text = "".join("1" if bit else "0" for bit in bits)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))
