"""How fast answers are judged: one after the other, and in a pool of processes.

    python -m benchmarks.judging                              (Spider's dev questions of ../shared/data/spider)
    python -m benchmarks.judging --data FOLDER --workers 2
    python -m benchmarks.judging --before CHECKOUT            (also the code of an earlier commit, as it judges one by one)

A third of the answers are gold queries, a third those of the next question, a third have a misspelt column. Each way judges them
in every repeat, in turn, so that whatever else the machine does befalls all of them. Starting the processes is not counted: in an
evaluation the model is being loaded meanwhile. CPU seconds count all processes of a way, its start included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import EvaluationSection
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judging import judging
from finetune.machine.hardware import usable_cores

TIMEOUT_SECONDS = 30.0
WARM_UP_SECONDS = 120.0


@dataclass
class Questions:
    records: list[Record]
    databases: list[Path]
    prompts: list[str]
    evaluation: EvaluationSection


@dataclass(frozen=True)
class Measured:
    """seconds: wall clock."""

    seconds: float
    correct: int


def read_questions(folder: Path) -> Questions:
    """The dev questions of a Spider-format folder whose databases are there."""
    records, databases = [], []
    for number, item in enumerate(json.loads((folder / "dev.json").read_text(encoding="utf-8"))):
        name = item["db_id"]
        database = folder / "database" / name / f"{name}.sqlite"
        if database.is_file():
            records.append(Record(f"q{number}", name, item["question"], item["query"], schema=""))
            databases.append(database)
    prompts = [record.question for record in records]
    return Questions(records, databases, prompts, EvaluationSection(timeout_seconds=TIMEOUT_SECONDS))


def answers_to(questions: Questions) -> list[str]:
    golds = [record.sql for record in questions.records]
    return [
        gold if number % 3 == 0 else golds[(number + 1) % len(golds)] if number % 3 == 1 else f"{gold} ORDER BY nmae"
        for number, gold in enumerate(golds)
    ]


def judged_here(questions: Questions, texts: list[str], workers: int) -> tuple[Measured, Measured]:
    """Of a first set of answers, and of a second one (of another model, or samples), whose golds are known."""
    with judging(questions, workers) as judged:
        if workers:
            _wait_for_processes(judged, workers)
        found = []
        for key, given in (("first", texts), ("second", [f"{text} LIMIT 9999" for text in texts])):
            began = time.monotonic()
            for number, text in enumerate(given):
                judged.submit(key, number, Answer(text, 1))
            rows = judged.rows(key)
            seconds = time.monotonic() - began
            found.append(Measured(seconds, sum(row.verdict == "correct" for row in rows)))
    return found[0], found[1]


def _wait_for_processes(judged: Any, workers: int) -> None:
    """Until each process has loaded its code."""
    pool, ends = judged._pool, time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < ends and pool.ready < workers:
        time.sleep(0.05)


BEFORE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.sql.engines.registry import open_sessions
try:
    from finetune.evaluation.judge import Judge
except ImportError:
    from finetune.evaluation.score import Judge
given = json.load(sys.stdin)
pairs = [(Record(**record), Path(database)) for record, database in given["questions"]]
groups = {}
for number, (record, database) in enumerate(pairs):
    groups.setdefault((database, record.sql), []).append(number)
with open_sessions() as session:
    judge = Judge(session, rule="test_suite", timeout_seconds=given["timeout"])
    session("sqlite").run(pairs[0][1], "SELECT 1", 10)
    began = time.monotonic()
    rows = [judge.row(*pairs[n], "", Answer(given["answers"][n], 1)) for group in groups.values() for n in group]
    print(json.dumps([time.monotonic() - began, sum(row.verdict == "correct" for row in rows)]))
"""


def judged_before(questions: Questions, texts: list[str], checkout: Path) -> Measured:
    """By the code of a checkout, one after the other, with equal golds beside each other, as `evaluate` did it."""
    pairs = list(zip(questions.records, questions.databases, strict=True))
    given = {
        "questions": [(vars(record), str(database)) for record, database in pairs],
        "answers": texts,
        "timeout": TIMEOUT_SECONDS,
    }
    done = subprocess.run(
        [sys.executable, "-c", BEFORE, str(checkout)],
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, correct = json.loads(done.stdout)
    return Measured(seconds, correct)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/spider"))
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    arguments = parser.parse_args()
    questions = read_questions(arguments.data)
    texts = answers_to(questions)
    ways: dict[str, Callable[[], list[Measured]]] = {
        "one by one": lambda: list(judged_here(questions, texts, 0)),
        f"{arguments.workers} processes": lambda: list(judged_here(questions, texts, arguments.workers)),
    }
    if arguments.before:
        ways = {"before, one by one": lambda: [judged_before(questions, texts, arguments.before)]} | ways
    found: dict[str, list[list[Measured]]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            before = cpu_seconds()
            found[name].append(way())
            used[name].append(cpu_seconds() - before)
    correct = {measured[0].correct for repeats in found.values() for measured in repeats}
    assert len(correct) == 1, f"the ways disagree: {correct}"
    print(f"{len(texts)} questions, {correct.pop()} right; {usable_cores()} cores, load {os.getloadavg()[0]:.1f}; "
          f"questions/s over {arguments.repeats} repeats")  # fmt: skip
    for name, repeats in found.items():
        for place, label in enumerate(("", ", golds known")[: len(repeats[0])]):
            speeds = sorted(len(texts) / repeat[place].seconds for repeat in repeats)
            spread = f"{speeds[0]:,.0f} to {speeds[-1]:,.0f}"
            print(f"{name + label:>34}: median {statistics.median(speeds):7,.0f}  ({spread})")
        answers = len(texts) * len(repeats[0])
        print(f"{'CPU':>34}: {1000 * statistics.median(used[name]) / answers:.2f} ms an answer, start included")


if __name__ == "__main__":
    main()
