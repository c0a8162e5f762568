"""The table that `make cloud-test` ends with, from pytest's JUnit file: `python -m tests.emulated_cloud.table
JUNIT-FILE`.

Below a scenario stand the figures that it has told with `figure`. Exit code 1, with their names, where tests were skipped that
were not to be (FT_CLOUD_REQUIRED=1).
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as tree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.emulated_cloud.possible import REQUIRED

MARK = "figure: "
STATES = {"failure": "FAILED", "error": "ERROR", "skipped": "skipped"}


def figure(text: str) -> None:
    """Tells one figure of the test that runs."""
    print(MARK + text)


@dataclass(frozen=True)
class Row:
    """One test. seconds: of itself, without its fixtures; state: as printed, a skipped one with the reason."""

    name: str
    seconds: float
    state: str
    figures: list[str]


def read_row(case: tree.Element) -> Row:
    parts = [part for part in case if part.tag in STATES]
    state = STATES[parts[0].tag] if parts else "passed"
    reason = parts[0].get("message", "") if state == "skipped" else ""
    module = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
    name = case.get("name", "").removeprefix("test_").partition("@")[0]  # behind it pytest-xdist names the group
    told = [line for line in (case.findtext("system-out") or "").splitlines() if line.startswith(MARK)]
    figures = [line.removeprefix(MARK) for line in told]
    return Row(f"{module}  {name}", float(case.get("time", 0)), f"{state} {reason}".strip(), figures)


def lines(rows: Iterable[Row], seconds: float) -> Iterator[str]:
    """Of the table, in the order of running. seconds: of the whole session, in which tests ran side by side."""
    rows = list(rows)
    width = max([len(row.name) for row in rows] + [len("scenario")])
    yield f"{'scenario':<{width}}  seconds"
    for row in rows:
        yield f"{row.name:<{width}}  {row.seconds:7.1f}  {row.state}"
        yield from (f"    {text}" for text in row.figures)
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
