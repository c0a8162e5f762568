"""The table that `make cloud-test` prints at its end, from pytest's JUnit file: `python -m tests.emulated_cloud.table
JUNIT-FILE`.

Below each scenario are the metrics that it has recorded with `record_metric`. Exit code 1, with their names, if tests were
skipped that must not be (FT_CLOUD_REQUIRED=1).
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as tree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.emulated_cloud.possible import REQUIRED

MARK = "metric: "
STATES = {"failure": "FAILED", "error": "ERROR", "skipped": "skipped"}


def record_metric(text: str) -> None:
    """Adds one line of text to the row of the running test."""
    print(MARK + text)


@dataclass(frozen=True)
class Row:
    """One test. seconds: without its fixtures; state: as printed, for a skipped test with the reason."""

    name: str
    seconds: float
    state: str
    metrics: list[str]


def read_row(case: tree.Element) -> Row:
    parts = [part for part in case if part.tag in STATES]
    state = STATES[parts[0].tag] if parts else "passed"
    reason = parts[0].get("message", "") if state == "skipped" else ""
    module = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
    name = case.get("name", "").removeprefix("test_").partition("@")[0]  # pytest-xdist appends the group
    marked = [line for line in (case.findtext("system-out") or "").splitlines() if line.startswith(MARK)]
    metrics = [line.removeprefix(MARK) for line in marked]
    return Row(f"{module}  {name}", float(case.get("time", 0)), f"{state} {reason}".strip(), metrics)


def lines(rows: Iterable[Row], seconds: float) -> Iterator[str]:
    """The lines of the table, in the order of running. seconds: of the whole session, in which tests ran in parallel."""
    rows = list(rows)
    width = max([len(row.name) for row in rows] + [len("scenario")])
    yield f"{'scenario':<{width}}  seconds"
    for row in rows:
        yield f"{row.name:<{width}}  {row.seconds:7.1f}  {row.state}"
        yield from (f"    {text}" for text in row.metrics)
    yield f"{'all, with preparation':<{width}}  {seconds:7.1f}  = {seconds / 60:.1f} minutes (measured)"


def main(junit: str) -> int:
    suite = next(tree.parse(junit).iter("testsuite"))
    rows = [read_row(case) for case in suite.iter("testcase")]
    print("", *lines(rows, float(suite.get("time", 0))), sep="\n")
    skipped = [row.name for row in rows if row.state.startswith("skipped")]
    if skipped and os.environ.get(REQUIRED) == "1":
        print(f"cloud-test: skipped, though {REQUIRED}=1: {', '.join(skipped)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
