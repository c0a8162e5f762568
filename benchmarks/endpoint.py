"""Whether an endpoint gives the answers that were scored, and how many a second.

    finetune serve RUN|EXPORT            (in another terminal)
    python -m benchmarks.endpoint RUN http://127.0.0.1:8000 --clients 64

Asks `finetune serve` every question of the run's evaluation (eval/tuned.jsonl, of which eval.json names the generator), each with
its schema, and judges what comes. Prints a JSON object: the questions, how many have the same SQL and the same verdict as in the
file, right ones of both, the seconds from the first question to the last answer, and what differs. All figures are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.data.prompts import load_template
from finetune.data.records import Record
from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judging import judging
from finetune.evaluation.questions import questions_of
from finetune.evaluation.score import Row
from finetune.run_folder import RunFolder, open_run
from finetune.runtime.console import escape_unprintable
from finetune.runtime.files import load_json
from finetune.serve.client import Endpoint

MOST_SHOWN = 20


def main() -> int:
    escape_unprintable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.endpoint"
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64, help="questions on their way at once (64)")
    parser.add_argument("--api-key-env", help="the variable that holds the endpoint's key")
    arguments = parser.parse_args()
    try:
        key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
        found = compared(open_run(arguments.run), "endpoint", asker(Endpoint(arguments.url, key), arguments.clients))
    except UserError as error:
        print(f"benchmarks.endpoint: {error}")
        return EXIT_USER_ERROR
    print(json.dumps(found | {"clients": arguments.clients}, indent=2))
    return 0


def asker(endpoint: Endpoint, clients: int) -> Callable[[list[Record]], list[str]]:
    """What asks the endpoint, with so many questions on their way at once. Raises UserError if it gives no answer."""
    served = endpoint.served()

    def sql_of(record: Record) -> str:
        return endpoint.ask(record.question, served, schema=record.schema, dialect=record.dialect)[0]

    def ask(records: list[Record]) -> list[str]:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(sql_of, records))

    return ask


def compared(run: RunFolder, name: str, ask: Callable[[list[Record]], list[str]]) -> dict[str, Any]:
    """The evaluation's answers beside those of `ask`, which is called `name`. Raises UserError if the run has no evaluation."""
    config = run.config()
    kept = [json.loads(line) for line in run.eval_rows("tuned").read_text(encoding="utf-8").splitlines()]
    config.evaluation.max_questions = None
    questions = questions_of(config, load_template(run.adapter))
    records = {record.id: record for record in questions.records}
    began = time.monotonic()
    answers = ask([records[row["id"]] for row in kept])
    seconds = time.monotonic() - began
    numbers = {record.id: number for number, record in enumerate(questions.records)}
    with judging(questions) as judged:
        for row, sql in zip(kept, answers, strict=True):
            judged.submit(name, numbers[row["id"]], Answer(sql, 0))
        rows = {row.id: row for row in judged.rows(name)}
    pairs = [(row, rows[row["id"]]) for row in kept]
    same_verdict = [pair for pair in pairs if pair[0]["verdict"] == pair[1].verdict]
    different = [pair for pair in pairs if pair[0]["prediction"] != pair[1].prediction]
    return {
        "questions": len(kept),
        "same_sql": len(kept) - len(different),
        "same_verdict": len(same_verdict),
        "right": {
            "evaluation": sum(row["verdict"] == "correct" for row in kept),
            name: sum(row.verdict == "correct" for row in rows.values()),
        },
        "evaluated_by": load_json(run.eval_json)["models"]["tuned"].get("generator"),
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(kept) / seconds, 2),
        "different": [_shown(*pair) for pair in different[:MOST_SHOWN]],
    }


def _shown(kept: dict[str, Any], row: Row) -> dict[str, Any]:
    return {
        "id": row.id, "verdicts": [kept["verdict"], row.verdict],
        "sql": [kept["prediction"][:300], row.prediction[:300]],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
