"""The child process of `judge_pool.JudgePool`: judges answers one after the other (judge.py), with a sandbox of its own.

Reads JSON objects from stdin, one per line: first the settings (parent, rule, timeout_seconds, limits), then batches:

    {"schemas": {"0": "CREATE ..."}, "records": {"17": [sql, dialect, schema, database]}, "answers": [[17, "SELECT 1", null]]}

Schemas and records are sent once, before the first answer to them. An answer without text (null) asks for the gold query only,
ahead of answers. Replies to each batch with one line for each answer, in order, as soon as it is judged: an outcome ({} for a
gold query), or {"user_error": ..., "code": ...}, or {"failed": traceback}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.records import Record
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Judge
from finetune.sql.engines.base import Limits
from finetune.sql.engines.confinement import end_with_parent
from finetune.sql.engines.registry import open_sessions


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever prints must not get between the replies
    requests = sys.stdin.buffer
    settings = json.loads(requests.readline())
    end_with_parent(settings["parent"])
    with open_sessions(Limits(**settings["limits"])) as session:
        judge = Judge(session, rule=settings["rule"], timeout_seconds=settings["timeout_seconds"])
        replies.write(b'{"ready": true}\n')
        _serve(judge, requests, replies)


def _serve(judge: Judge, requests: BinaryIO, replies: Any) -> None:
    schemas: dict[str, str] = {}
    records: dict[str, tuple[Record, Path]] = {}
    for line in requests:
        batch = json.loads(line)
        schemas |= batch["schemas"]
        for number, (sql, dialect, schema, database) in batch["records"].items():
            record = Record(id="", db_id="", question="", sql=sql, schema=schemas[schema], dialect=dialect)
            records[number] = record, Path(database)
        for number, text, problem in batch["answers"]:
            reply = _judged(judge, *records[str(number)], None if text is None else Answer(text, 0, problem))
            replies.write(json.dumps(reply).encode() + b"\n")


def _judged(judge: Judge, record: Record, database: Path, answer: Answer | None) -> dict[str, Any]:
    try:
        if answer is None:
            judge.prepare(record, database)
            return {}
        return judge.outcome(record, database, answer).as_dict()
    except UserError as error:
        return {"user_error": str(error), "code": error.code}
    except MemoryError:
        os._exit(1)  # a fresh process has more; twice at one answer is its verdict
    except Exception:
        return {"failed": traceback.format_exc()}
